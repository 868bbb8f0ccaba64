// Rotary position embedding: pairs of a head's first numbers are turned by an angle; sign -1 turns back.
#include "threads.hpp"
#include "vectors.hpp"

namespace {

template <class T>
void rope(const T* x, int64_t token_stride, int64_t head_stride, T* y, int64_t y_token_stride, int64_t y_head_stride,
          const float* cos, int64_t cos_stride, const float* sin, int64_t sin_stride, int64_t tokens, int64_t heads,
          int64_t width, int64_t pairs, int64_t interleaved, float sign, int64_t threads) {
    parallel_rows(threads, tokens, heads * width, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
            const float *c = cos + t * cos_stride, *s = sin + t * sin_stride;
            for (int64_t h = 0; h < heads; h++) {
                const T* from = x + t * token_stride + h * head_stride;
                T* to = y + t * y_token_stride + h * y_head_stride;
                if (interleaved)
                    for (int64_t i = 0; i < pairs; i++) {
                        float a = to_float(from[2 * i]), b = to_float(from[2 * i + 1]), turn = s[i] * sign;
                        set(to + 2 * i, a * c[i] - b * turn);
                        set(to + 2 * i + 1, b * c[i] + a * turn);
                    }
                else
                    each(pairs, [&](int64_t i, auto e) {
                        vf a = load(from + i, e), b = load(from + pairs + i, e);
                        vf turn = load(s + i, e) * sign, stay = load(c + i, e);
                        store(to + i, a * stay - b * turn, e);
                        store(to + pairs + i, b * stay + a * turn, e);
                    });
                if (to != from)
                    __builtin_memcpy(to + 2 * pairs, from + 2 * pairs, (width - 2 * pairs) * sizeof(T));
            }
        }
    });
}

}  // namespace

#define EXPORT_FOR(T, type)                                                                                         \
    EXPORT(rope_##type)(const T* x, int64_t token_stride, int64_t head_stride, T* y, int64_t y_token_stride,        \
                        int64_t y_head_stride, const float* cos, int64_t cos_stride, const float* sin,              \
                        int64_t sin_stride, int64_t tokens, int64_t heads, int64_t width, int64_t pairs,            \
                        int64_t interleaved, float sign, int64_t threads) {                                                 \
        rope<T>(x, token_stride, head_stride, y, y_token_stride, y_head_stride, cos, cos_stride, sin, sin_stride,   \
                tokens, heads, width, pairs, interleaved, sign, threads);                                           \
    }
EXPORT_FOR(float, float32)
EXPORT_FOR(bf16, bfloat16)
