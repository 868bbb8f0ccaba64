// RMSNorm and LayerNorm: y = (x - mean) / deviation * (weight + offset) + bias, with the sum of a residual before it.
#include "threads.hpp"
#include "vectors.hpp"

namespace {

template <class T> struct Norm {
    const T *x, *residual, *weight, *bias;  // all but x may be null
    T *sum, *y;                             // sum: x + residual, where there is a residual
    float *mean, *scale;                    // mean: null for RMSNorm; scale: 1 / deviation
    int64_t x_stride, residual_stride, rows, columns;
    float eps, offset;
    int64_t cast_first;  // round the normalised x to T before the weight

    void row(int64_t r) const {
        const T* from = x + r * x_stride;
        if (residual) {
            const T* other = residual + r * residual_stride;
            each(columns, [&](int64_t i, auto e) {
                store(sum + r * columns + i, load(from + i, e) + load(other + i, e), e);
            });
            from = sum + r * columns;
        }
        float center = 0;
        if (mean) {
            vf total = {};
            each(columns, [&](int64_t i, auto e) { total += load(from + i, e); });
            mean[r] = center = ::sum(total) / float(columns);
        }
        vf square = {};
        each(columns, [&](int64_t i, auto e) {
            vf v = keep(load(from + i, e) - center, e, 0);
            square += v * v;
        });
        float s = scale[r] = 1.f / __builtin_sqrtf(::sum(square) / float(columns) + eps);
        each(columns, [&](int64_t i, auto e) {
            vf v = (load(from + i, e) - center) * s;
            if (cast_first) v = rounded<T>(v);
            if (weight) v *= load(weight + i, e) + offset;
            if (bias) v += load(bias + i, e);
            store(y + r * columns + i, v, e);
        });
    }
};

template <class T> struct NormBackward {
    const T *x, *weight, *grad, *grad_sum;  // grad_sum: gradient that reaches x beside the norm, or null
    const float *mean, *scale;
    T* grad_x;
    float *grad_weight, *grad_bias;  // (pieces, columns), zero at the start, or null
    int64_t x_stride, grad_stride, grad_sum_stride, rows, columns, pieces;
    float offset;
    int64_t cast_first;

    void row(int64_t r, float* weight_total, float* bias_total) const {
        const T *from = x + r * x_stride, *g = grad + r * grad_stride;
        const float center = mean ? mean[r] : 0.f, s = scale[r];
        auto normal = [&](int64_t i, auto e) { return keep((load(from + i, e) - center) * s, e, 0); };
        auto scaled = [&](int64_t i, auto e) {
            vf v = load(g + i, e);
            return weight ? v * (load(weight + i, e) + offset) : v;
        };
        vf along = {}, total = {};
        each(columns, [&](int64_t i, auto e) {
            vf n = normal(i, e), v = scaled(i, e);
            along += v * n;
            total += v;
            if (weight_total) {
                vf value = load(g + i, e) * (cast_first ? rounded<T>(n) : n);
                store(weight_total + i, load(weight_total + i, e) + value, e);
            }
            if (bias_total) store(bias_total + i, load(bias_total + i, e) + load(g + i, e), e);
        });
        const float a = ::sum(along) / float(columns), b = mean ? ::sum(total) / float(columns) : 0.f;
        each(columns, [&](int64_t i, auto e) {
            vf v = (scaled(i, e) - normal(i, e) * a - b) * s;
            if (grad_sum) v += load(grad_sum + r * grad_sum_stride + i, e);
            store(grad_x + r * columns + i, v, e);
        });
    }

    void run(int64_t threads) const {
        // Sums over rows are cut by the shape alone, so they are the same whatever the number of threads.
        int64_t piece = (rows + pieces - 1) / pieces;
        parallel(threads, pieces, [&](int64_t p) {
            for (int64_t r = p * piece; r < smaller((p + 1) * piece, rows); r++)
                row(r, grad_weight ? grad_weight + p * columns : nullptr, grad_bias ? grad_bias + p * columns : nullptr);
        });
    }
};

}  // namespace

#define EXPORT_FOR(T, type)                                                                                            \
    EXPORT(norm_##type)(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const T* weight,     \
                        const T* bias, T* sum, T* y, float* mean, float* scale, int64_t rows, int64_t columns,         \
                        float eps, float offset, int64_t cast_first, int64_t threads) {                                        \
        Norm<T> norm{x, residual, weight, bias, sum, y, mean, scale, x_stride, residual_stride, rows, columns,         \
                     eps, offset, cast_first};                                                                         \
        parallel_rows(threads, rows, columns, [&](int64_t first, int64_t last) {                                       \
            for (int64_t r = first; r < last; r++) norm.row(r);                                                        \
        });                                                                                                            \
    }                                                                                                                  \
    EXPORT(norm_backward_##type)(const T* x, int64_t x_stride, const T* weight, const T* grad, int64_t grad_stride,    \
                                 const T* grad_sum, int64_t grad_sum_stride, const float* mean, const float* scale,    \
                                 T* grad_x, float* grad_weight, float* grad_bias, int64_t rows, int64_t columns,       \
                                 int64_t pieces, float offset, int64_t cast_first, int64_t threads) {                          \
        NormBackward<T>{x, weight, grad, grad_sum, mean, scale, grad_x, grad_weight, grad_bias, x_stride, grad_stride, \
                        grad_sum_stride, rows, columns, pieces, offset, cast_first}                                    \
            .run(threads);                                                                                             \
    }
EXPORT_FOR(float, float32)
EXPORT_FOR(bf16, bfloat16)
