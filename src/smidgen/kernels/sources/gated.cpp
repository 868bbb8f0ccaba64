// y = f(gate) * up for f = SiLU, GELU or GELU by tanh, and its gradients; y is computed again in backward if wanted.
#include "threads.hpp"
#include "vectors.hpp"

namespace {

struct Value {
    vf f, slope;
};

struct Silu {
    static Value at(vf x) {
        vf s = sigmoid(x);
        return {x * s, s * (1.f + x * (1.f - s))};
    }
};

struct Gelu {
    static Value at(vf x) {
        vf cdf = normal_cdf(x);
        return {x * cdf, cdf + x * 0.39894228f * exp(x * x * -0.5f)};
    }
};

struct GeluTanh {
    static Value at(vf x) {
        const float a = 0.79788456f, b = 0.044715f;
        // 0.5 (1 + tanh(z)) is the logistic function of 2 z, which does not cancel below zero.
        vf s = sigmoid(2.f * a * (x + b * x * x * x));
        return {x * s, s + x * s * (1.f - s) * 2.f * a * (1.f + 3.f * b * x * x)};
    }
};

template <class F, class T>
void forward(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* y, int64_t y_stride, int64_t rows,
             int64_t columns, int64_t threads) {
    parallel_rows(threads, rows, columns, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            const T *a = gate + r * gate_stride, *b = up + r * up_stride;
            T* to = y + r * y_stride;
            each(columns, [=](int64_t i, auto e) { store(to + i, F::at(load(a + i, e)).f * load(b + i, e), e); });
        }
    });
}

template <class F, class T>
void backward(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, const T* grad, int64_t grad_stride,
              T* grad_gate, T* grad_up, int64_t out_stride, T* y, int64_t rows, int64_t columns, int64_t threads) {
    parallel_rows(threads, rows, columns, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            const T *a = gate + r * gate_stride, *b = up + r * up_stride, *d = grad + r * grad_stride;
            T *of_gate = grad_gate + r * out_stride, *of_up = grad_up + r * out_stride;
            T* again = y ? y + r * columns : nullptr;
            each(columns, [=](int64_t i, auto e) {
                const Value value = F::at(load(a + i, e));
                const vf u = load(b + i, e), g = load(d + i, e);
                store(of_gate + i, g * u * value.slope, e);
                store(of_up + i, g * value.f, e);
                if (again) store(again + i, value.f * u, e);
            });
        }
    });
}

}  // namespace

#define EXPORT_FOR(T, type)                                                                                            \
    EXPORT(gated_##type)(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* y, int64_t y_stride,   \
                         int64_t rows, int64_t columns, int64_t kind, int64_t threads) {                                       \
        (kind == 0   ? forward<Silu, T>                                                                                \
         : kind == 1 ? forward<Gelu, T>                                                                                \
                     : forward<GeluTanh, T>)(gate, gate_stride, up, up_stride, y, y_stride, rows, columns, threads);   \
    }                                                                                                                  \
    EXPORT(gated_backward_##type)(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, const T* grad,   \
                                  int64_t grad_stride, T* grad_gate, T* grad_up, int64_t out_stride, T* y,             \
                                  int64_t rows, int64_t columns, int64_t kind, int64_t threads) {                              \
        (kind == 0   ? backward<Silu, T>                                                                               \
         : kind == 1 ? backward<Gelu, T>                                                                               \
                     : backward<GeluTanh, T>)(gate, gate_stride, up, up_stride, grad, grad_stride, grad_gate, grad_up, \
                                              out_stride, y, rows, columns, threads);                                  \
    }
EXPORT_FOR(float, float32)
EXPORT_FOR(bf16, bfloat16)
