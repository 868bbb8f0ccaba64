// Products with a matrix of few rows, R, in float32, and dropout on the way: see lora.py.
//
//     down   low (N, R) = dropout(x) a^T
//     outer  sums (R, I) = low^T dropout(x)
//     up     y (N, I) += dropout(low a)
//
// Columns are taken in the pairs of vectors whose dropout one hash decides. Sums stay in registers over all that is
// summed; ranks are cut into tiles that fit there. What is kept is scaled once, at the end of a sum.
#include "dropout.hpp"
#include "threads.hpp"

namespace {

// Rows and ranks of a tile; their sums are held in registers, 32 of them with AVX512, else 16.
#if defined(__AVX512F__)
constexpr int COPY_ROWS = 0, DOWN_ROWS = 3, DOWN_RANKS = 8, OUTER_RANKS = 8, UP_ROWS = 4;
#elif defined(__AVX2__)
constexpr int COPY_ROWS = 0, DOWN_ROWS = 1, DOWN_RANKS = 8, OUTER_RANKS = 4, UP_ROWS = 2;
#else
constexpr int COPY_ROWS = 4, DOWN_ROWS = 2, DOWN_RANKS = 4, OUTER_RANKS = 4, UP_ROWS = 2;
#endif
constexpr int64_t BLOCK = 64, AHEAD = 16;

template <int N> struct Size {
    static constexpr int n = N;
};

// f(r, size) for the ranks from `first` in tiles of `size`.
template <int N, class F> inline void tiles(int64_t first, int64_t rank, F f) {
    for (; first + N <= rank; first += N) f(first, Size<N>{});
    if constexpr (N > 1) tiles<N / 2>(first, rank, f);
}

template <class T, bool DROP> struct LowRank {
    Mask mask;
    int64_t rows, columns, rank;

    int64_t width() const { return round_up(columns, 32); }

    // What stays of the numbers at x and 16 columns further on. Those at `ahead` are read soon: rows are too short, or
    // too far apart, for the machine to guess.
    template <class Near, class Far>
    void read(const T* x, const T* ahead, uint32_t counter, Near near, Far far, vf& first, vf& second) const {
        prefetch(ahead, 32);
        first = load(x, near);
        second = load(x + 16, far);
        if (DROP) {
            const Mask::Stays stays = mask.stays(counter);
            first = stays.near ? first : vf{};
            second = stays.far ? second : vf{};
        }
    }

    // Some rows of `a` in the order in which they are read: for each pair of vectors that of every row.
    void pack(const float* a, int64_t count, float* to) const {
        each_pair(columns, [&](int64_t i, uint32_t, auto near, auto far) {
            for (int64_t r = 0; r < count; r++, to += 2 * LANES) {
                store(to, load(a + r * columns + i, near), Whole{});
                store(to + LANES, load(a + r * columns + i + 16, far), Whole{});
            }
        });
    }

    template <int ROWS, int R> void dot_rows(const T* x, int64_t stride, const float* a, float* low, int64_t first) const {
        vf dots[ROWS][R] = {};
        each_pair(columns, [&](int64_t i, uint32_t words, auto near, auto far) {
            vf v[2][ROWS];
            for (int n = 0; n < ROWS; n++) {
                const T* from = x + (first + n) * stride + i;
                read(from, from + ROWS * stride, mask.counter(first + n, columns) + words, near, far, v[0][n], v[1][n]);
            }
            for (int half = 0; half < 2; half++)
                for (int r = 0; r < R; r++) {
                    const vf w = load(a + (2 * r + half) * LANES, Whole{});
                    for (int n = 0; n < ROWS; n++) dots[n][r] += v[half][n] * w;
                }
            a += 2 * R * LANES;
        });
        for (int n = 0; n < ROWS; n++) {
            const vf total = sums<R>(dots[n]) * mask.scale;
            __builtin_memcpy(low + (first + n) * rank, &total, R * sizeof(float));
        }
    }

    // dot_rows for rows first ... last - 1 and all ranks, with `a` packed.
    void dots(const T* x, int64_t stride, const float* a, float* low, int64_t first, int64_t last) const {
        tiles<DOWN_RANKS>(0, rank, [&](int64_t r, auto size) {
            constexpr int R = decltype(size)::n;
            int64_t n = first;
            for (; n + DOWN_ROWS <= last; n += DOWN_ROWS)
                dot_rows<DOWN_ROWS, R>(x, stride, a + r * width(), low + r, n);
            for (; n < last; n++) dot_rows<1, R>(x, stride, a + r * width(), low + r, n);
        });
    }

    // The same from a copy of what stays of x, where reading it once for each tile of ranks would cost more.
    void dots_of_copy(const T* x, int64_t stride, const float* a, float* low, int64_t first, int64_t last,
                      float* copy) const {
        for (int64_t n = first; n < last; n++) {
            const T* from = x + n * stride;
            float* to = copy + (n - first) * width();
            each_pair(columns, [&](int64_t i, uint32_t words, auto near, auto far) {
                vf v[2];
                read(from + i, from + stride + i, mask.counter(n, columns) + words, near, far, v[0], v[1]);
                store(to + i, v[0], Whole{});
                store(to + i + 16, v[1], Whole{});
            });
        }
        LowRank<float, false>{mask, rows, columns, rank}.dots(copy, width(), a, low + first * rank, 0, last - first);
    }

    void down(const T* x, int64_t stride, const float* a, float* low, int64_t threads) const {
        Buffer<float> packed(rank * width());
        tiles<DOWN_RANKS>(0, rank, [&](int64_t r, auto size) {
            pack(a + r * columns, decltype(size)::n, packed.data + r * width());
        });
        const bool by_copy = COPY_ROWS > 0 && rank > DOWN_RANKS;
        const int64_t piece = by_copy ? COPY_ROWS : BLOCK, scratch = by_copy ? COPY_ROWS * width() : 0;
        parallel(threads, (rows + piece - 1) / piece, scratch, [&](int64_t task, float* copy) {
            const int64_t first = task * piece, last = smaller(first + piece, rows);
            if (by_copy)
                dots_of_copy(x, stride, packed.data, low, first, last, copy);
            else
                dots(x, stride, packed.data, low, first, last);
        });
    }

    // The sums of rows first ... last - 1, added to those at `to` where `more`.
    template <int R, class Near, class Far>
    void add_rows(const float* low, const T* x, int64_t stride, float* to, int64_t first, int64_t last, uint32_t words,
                  bool more, Near near, Far far) const {
        vf total[2][R] = {};
        for (int64_t n = first; n < last; n++) {
            vf v[2];
            read(x + n * stride, x + (n + AHEAD) * stride, mask.counter(n, columns) + words, near, far, v[0], v[1]);
            for (int r = 0; r < R; r++) {
                const vf l = all(low[n * rank + r]);
                for (int half = 0; half < 2; half++) total[half][r] += l * v[half];
            }
        }
        for (int r = 0; r < R; r++, to += columns) {
            const vf before[2] = {more ? load(to, near) : vf{}, more ? load(to + 16, far) : vf{}};
            store(to, total[0][r] * mask.scale + before[0], near);
            store(to + 16, total[1][r] * mask.scale + before[1], far);
        }
    }

    // The rows are cut into `parts` by the shape alone, each with sums of its own: no thread's pace changes a sum.
    void outer(const float* low, const T* x, int64_t stride, float* sums, int64_t parts, int64_t threads) const {
        const int64_t part = (rows + parts - 1) / parts, slice = 256, slices = (columns + slice - 1) / slice;
        parallel(threads, parts * slices, [&](int64_t task) {
            const int64_t p = task / slices, left = task % slices * slice, last = smaller((p + 1) * part, rows);
            int64_t first = p * part;
            do {  // once where there is no row
                const int64_t end = smaller(first + BLOCK, last);
                each_pair(smaller(slice, columns - left), [&](int64_t i, uint32_t words, auto near, auto far) {
                    tiles<OUTER_RANKS>(0, rank, [&](int64_t r, auto size) {
                        add_rows<decltype(size)::n>(low + r, x + left + i, stride,
                                                    sums + (p * rank + r) * columns + left + i, first, end,
                                                    uint32_t(left / 2) + words, first > p * part, near, far);
                    });
                });
                first = end;
            } while (first < last);
        });
    }

    template <int ROWS, class Near, class Far>
    void add(const float* low, const float* a, T* y, int64_t stride, int64_t first, uint32_t words, Near near,
             Far far) const {
        vf total[2][ROWS] = {};
        for (int64_t r = 0; r < rank; r++, a += 2 * LANES) {
            const vf w[2] = {load(a, Whole{}), load(a + LANES, Whole{})};
            for (int n = 0; n < ROWS; n++) {
                const vf l = all(low[(first + n) * rank + r]);
                for (int half = 0; half < 2; half++) total[half][n] += l * w[half];
            }
        }
        for (int n = 0; n < ROWS; n++) {
            T* to = y + (first + n) * stride;
            prefetch(to + AHEAD * stride, 32);
            if (DROP) {
                const Mask::Stays stays = mask.stays(mask.counter(first + n, columns) + words);
                total[0][n] = stays.near ? total[0][n] * mask.scale : vf{};
                total[1][n] = stays.far ? total[1][n] * mask.scale : vf{};
            }
            store(to, load(to, near) + total[0][n], near);
            store(to + 16, load(to + 16, far) + total[1][n], far);
        }
    }

    void up(const float* low, const float* a, T* y, int64_t stride, int64_t threads) const {
        Buffer<float> packed(rank * width());
        pack(a, rank, packed.data);
        parallel(threads, (rows + BLOCK - 1) / BLOCK, [&](int64_t task) {
            const int64_t last = smaller((task + 1) * BLOCK, rows);
            const float* from = packed.data;
            each_pair(columns, [&](int64_t i, uint32_t words, auto near, auto far) {
                int64_t n = task * BLOCK;
                for (; n + UP_ROWS <= last; n += UP_ROWS) add<UP_ROWS>(low, from, y + i, stride, n, words, near, far);
                for (; n < last; n++) add<1>(low, from, y + i, stride, n, words, near, far);
                from += 2 * LANES * rank;
            });
        });
    }
};

// run(f) with the code for a mask, or for none.
template <class T, class F> void with_mask(Mask mask, int64_t rows, int64_t columns, int64_t rank, F f) {
    if (mask.threshold)
        f(LowRank<T, true>{mask, rows, columns, rank});
    else
        f(LowRank<T, false>{mask, rows, columns, rank});
}

}  // namespace

#define EXPORT_FOR(T, type)                                                                                            \
    EXPORT(low_rank_down_##type)(const T* x, int64_t stride, const float* a, float* low, int64_t rows,                 \
                                 int64_t columns, int64_t rank, int64_t seed, int64_t threshold, int64_t threads) {    \
        with_mask<T>(Mask(seed, threshold), rows, columns, rank,                                                       \
                     [&](auto product) { product.down(x, stride, a, low, threads); });                                 \
    }                                                                                                                  \
    EXPORT(low_rank_outer_##type)(const float* low, const T* x, int64_t stride, float* sums, int64_t parts,            \
                                  int64_t rows, int64_t columns, int64_t rank, int64_t seed, int64_t threshold,        \
                                  int64_t threads) {                                                                   \
        with_mask<T>(Mask(seed, threshold), rows, columns, rank,                                                       \
                     [&](auto product) { product.outer(low, x, stride, sums, parts, threads); });                      \
    }                                                                                                                  \
    EXPORT(low_rank_up_##type)(const float* low, const float* a, T* y, int64_t stride, int64_t rows, int64_t columns,  \
                               int64_t rank, int64_t seed, int64_t threshold, int64_t threads) {                       \
        with_mask<T>(Mask(seed, threshold), rows, columns, rank,                                                       \
                     [&](auto product) { product.up(low, a, y, stride, threads); });                                   \
    }
EXPORT_FOR(float, float32)
EXPORT_FOR(bf16, bfloat16)
