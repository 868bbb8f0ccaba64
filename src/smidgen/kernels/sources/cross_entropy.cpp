// Cross-entropy of rows of logits, which become their own gradient in place: see cross_entropy.py for the formula.
#include "threads.hpp"
#include "vectors.hpp"

namespace {

inline float log1(float x) { return __builtin_logf(x); }

template <class T> struct CrossEntropy {
    T* logits;
    const int64_t* targets;
    const float* row_grad;  // what the gradient of each row is multiplied by; null: 1
    float* losses;          // null: not wanted
    int64_t stride, rows, columns;
    float logit_scale, softcap, smoothing, z_loss;
    int64_t with_grad;

    vf shaped(vf x) const {
        x *= logit_scale;
        return softcap > 0 ? softcap * tanh(x * (1.f / softcap)) : x;
    }

    void row(int64_t r) const {
        T* x = logits + r * stride;
        vf top = all(-__builtin_inff()), linear = {};
        each(columns, [&](int64_t i, auto e) {
            vf v = shaped(load(x + i, e));
            top = max(top, keep(v, e, -__builtin_inff()));
            linear += keep(v, e, 0);
        });
        const float highest = largest(top);
        vf total = {};
        each(columns, [&](int64_t i, auto e) {
            total += keep(exp(shaped(load(x + i, e)) - highest), e, 0);
        });
        const float lse = highest + log1(::sum(total));
        const float at_target = shaped(all(to_float(x[targets[r]])))[0];
        if (losses)
            losses[r] = lse - (1.f - smoothing) * at_target - smoothing * ::sum(linear) / float(columns) +
                        z_loss * lse * lse;
        if (!with_grad) return;
        const float g = row_grad ? row_grad[r] : 1.f;
        const float of_softmax = g * (1.f + 2.f * z_loss * lse), of_all = g * smoothing / float(columns);
        auto gradient = [&](vf raw, vf target) {
            vf v = shaped(raw);
            vf d = of_softmax * exp(v - lse) - of_all - g * (1.f - smoothing) * target;
            if (softcap > 0) d *= 1.f - v * v * (1.f / (softcap * softcap));
            return d * logit_scale;
        };
        const float target_grad = gradient(all(to_float(x[targets[r]])), all(1.f))[0];
        each(columns, [&](int64_t i, auto e) { store(x + i, gradient(load(x + i, e), vf{}), e); });
        set(x + targets[r], target_grad);
    }
};

}  // namespace

#define EXPORT_FOR(T, type)                                                                                         \
    EXPORT(cross_entropy_##type)(T* logits, int64_t stride, const int64_t* targets, const float* row_grad,          \
                                 float* losses, int64_t rows, int64_t columns, float logit_scale, float softcap,    \
                                 float smoothing, float z_loss, int64_t with_grad, int64_t threads) {                       \
        CrossEntropy<T> work{logits,      targets, row_grad,  losses, stride,   rows, columns,                      \
                             logit_scale, softcap, smoothing, z_loss, with_grad};                                   \
        parallel_rows(threads, rows, columns, [&](int64_t first, int64_t last) {                                    \
            for (int64_t r = first; r < last; r++) work.row(r);                                                     \
        });                                                                                                         \
    }
EXPORT_FOR(float, float32)
EXPORT_FOR(bf16, bfloat16)
