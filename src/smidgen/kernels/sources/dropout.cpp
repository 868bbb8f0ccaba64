// Dropout whose mask is a function of the seed and of the place: see dropout.py for the definition.
#include "dropout.hpp"
#include "threads.hpp"

namespace {

template <class T, bool ADD>
void dropout(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows, int64_t columns, Mask mask,
             int64_t threads) {
    parallel_rows(threads, rows, columns, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const T* from = x + row * x_stride;
            T* to = y + row * y_stride;
            const uint32_t counter = mask.counter(row, columns);
            const auto place = [=](int64_t i, vi stays, auto extent) {
                vf value = stays ? load(from + i, extent) * mask.scale : vf{};
                store(to + i, ADD ? value + load(to + i, extent) : value, extent);
            };
            each_pair(columns, [=](int64_t i, uint32_t words, auto near, auto far) {
                const Mask::Stays stays = mask.stays(counter + words);
                place(i, stays.near, near);
                place(i + 16, stays.far, far);
            });
        }
    });
}

}  // namespace

#define EXPORT_FOR(T, type)                                                                                            \
    EXPORT(dropout_##type)(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows, int64_t columns,        \
                           int64_t seed, int64_t threshold, int64_t add, int64_t threads) {                            \
        (add ? dropout<T, true> : dropout<T, false>)(x, x_stride, y, y_stride, rows, columns, Mask(seed, threshold),   \
                                                     threads);                                                         \
    }
EXPORT_FOR(float, float32)
EXPORT_FOR(bf16, bfloat16)
