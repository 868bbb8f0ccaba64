// Products with a matrix of few rows, R, in float32, and dropout on the way: see lora.py.
//
//     down   low (N, R) = dropout(x) a^T
//     outer  sums (R, I) = low^T dropout(x)
//     up     y (N, I) += dropout(low a)
//
// Rows of x or y are taken GROUP at a time, as float32 in a scratch that fits the cache.
#include "dropout.hpp"
#include "threads.hpp"

namespace {

constexpr int GROUP = 4;

template <class T> struct LowRank {
    Mask mask;
    int64_t rows, columns, rank;

    int64_t scratch() const { return GROUP * width(); }
    int64_t width() const { return round_up(columns, LANES); }

    // dropout(x), rows that do not exist zero.
    void read(const T* x, int64_t stride, int64_t first, float* to) const {
        for (int64_t n = 0; n < GROUP; n++) {
            float* at = to + n * width();
            const T* from = x + (first + n) * stride;
            store(at + width() - LANES, vf{}, Whole{});
            if (first + n >= rows)
                each(columns, [=](int64_t i, auto e) { store(at + i, vf{}, e); });
            else if (mask.threshold)
                mask.row(first + n, columns, [=](int64_t i, vf f, auto e) { store(at + i, load(from + i, e) * f, e); });
            else
                each(columns, [=](int64_t i, auto e) { store(at + i, load(from + i, e), e); });
        }
    }

    template <int R> void dots(const float* x, const float* a, float* low, int64_t count) const {
        vf sums[GROUP][R] = {};
        each(columns, [&](int64_t i, auto e) {
            vf v[GROUP];
            for (int n = 0; n < GROUP; n++) v[n] = load(x + n * width() + i, e);
            for (int r = 0; r < R; r++) {
                const vf w = load(a + r * columns + i, e);
                for (int n = 0; n < GROUP; n++) sums[n][r] += v[n] * w;
            }
        });
        for (int n = 0; n < GROUP; n++)
            for (int r = 0; r < R; r++)
                if (n < count) low[n * rank + r] = sum(sums[n][r]);
    }

    void down(const T* x, int64_t stride, const float* a, float* low, int64_t threads) const {
        pieces(threads, [&](int64_t first, float* own) {
            read(x, stride, first, own);
            int64_t r = 0;
            for (; r + 4 <= rank; r += 4) dots<4>(own, a + r * columns, low + first * rank + r, rows - first);
            for (; r < rank; r++) dots<1>(own, a + r * columns, low + first * rank + r, rows - first);
        });
    }

    // The rows are cut into `parts` by the shape alone, each with sums of its own: no thread's pace changes a sum.
    void outer(const float* low, const T* x, int64_t stride, float* sums, int64_t parts, int64_t threads) const {
        const int64_t part = round_up((rows + parts - 1) / parts, GROUP);
        parallel(threads, parts, scratch(), [&](int64_t p, float* own) {
            for (int64_t first = p * part; first < smaller((p + 1) * part, rows); first += GROUP) {
                read(x, stride, first, own);
                each(columns, [&](int64_t i, auto e) {
                    vf v[GROUP];
                    for (int n = 0; n < GROUP; n++) v[n] = load(own + n * width() + i, e);
                    for (int64_t r = 0; r < rank; r++) {
                        float* to = sums + (p * rank + r) * columns + i;
                        vf total = load(to, e);
                        for (int n = 0; n < GROUP; n++) total += all(low[smaller(first + n, rows - 1) * rank + r]) * v[n];
                        store(to, total, e);
                    }
                });
            }
        });
    }

    void up(const float* low, const float* a, T* y, int64_t stride, int64_t threads) const {
        pieces(threads, [&](int64_t first, float* own) {
            const int64_t count = smaller<int64_t>(GROUP, rows - first);
            each(columns, [&](int64_t i, auto e) {
                vf total[GROUP] = {};
                for (int64_t r = 0; r < rank; r++) {
                    const vf w = load(a + r * columns + i, e);
                    for (int n = 0; n < GROUP; n++)
                        total[n] += all(low[smaller(first + n, rows - 1) * rank + r]) * w;
                }
                for (int n = 0; n < GROUP; n++) store(own + n * width() + i, total[n], Whole{});
            });
            for (int64_t n = 0; n < count; n++) {
                T* to = y + (first + n) * stride;
                const float* from = own + n * width();
                if (mask.threshold)
                    mask.row(first + n, columns, [=](int64_t i, vf f, auto e) {
                        store(to + i, load(to + i, e) + load(from + i, e) * f, e);
                    });
                else
                    each(columns, [=](int64_t i, auto e) { store(to + i, load(to + i, e) + load(from + i, e), e); });
            }
        });
    }

    // f(first, scratch) for the groups of rows, several to a task.
    template <class F> void pieces(int64_t threads, const F& f) const {
        const int64_t piece = round_up(65536 / (columns + 1) + 1, GROUP);
        parallel(threads, (rows + piece - 1) / piece, scratch(), [&](int64_t p, float* own) {
            for (int64_t first = p * piece; first < smaller((p + 1) * piece, rows); first += GROUP) f(first, own);
        });
    }
};

}  // namespace

#define EXPORT_FOR(T, type)                                                                                            \
    EXPORT(low_rank_down_##type)(const T* x, int64_t stride, const float* a, float* low, int64_t rows,                 \
                                 int64_t columns, int64_t rank, int64_t seed, int64_t threshold, int64_t threads) {    \
        LowRank<T>{Mask(seed, threshold), rows, columns, rank}.down(x, stride, a, low, threads);                       \
    }                                                                                                                  \
    EXPORT(low_rank_outer_##type)(const float* low, const T* x, int64_t stride, float* sums, int64_t parts,            \
                                  int64_t rows, int64_t columns, int64_t rank, int64_t seed, int64_t threshold,        \
                                  int64_t threads) {                                                                   \
        LowRank<T>{Mask(seed, threshold), rows, columns, rank}.outer(low, x, stride, sums, parts, threads);            \
    }                                                                                                                  \
    EXPORT(low_rank_up_##type)(const float* low, const float* a, T* y, int64_t stride, int64_t rows, int64_t columns,  \
                               int64_t rank, int64_t seed, int64_t threshold, int64_t threads) {                       \
        LowRank<T>{Mask(seed, threshold), rows, columns, rank}.up(low, a, y, stride, threads);                         \
    }
EXPORT_FOR(float, float32)
EXPORT_FOR(bf16, bfloat16)
