// Products of small matrices for attention, and the layouts that they read.
//
// Matrices are made of words of 32 bits: one float32, or two neighbours in the summed direction as bfloat16, for which
// there is an instruction that multiplies and adds pairs. A is read word by word, B in vectors along its rows:
//     C (m, n) = sum over k words of A (m, k) B (k, n)
// So what is packed as B serves as A of the transposed matrix, too.
#pragma once
#include "vectors.hpp"

namespace {

typedef int32_t word;

inline vf all_words(word w) { return bits<vf>(vi{} + w); }

struct Singles {  // a word is one float32
    static constexpr int STEP = 1;
    static inline vf add_product(vf sum, vf a, vf b) { return sum + a * b; }
    static inline void pack(word* to, vf v) { __builtin_memcpy(to, &v, sizeof v); }  // LANES numbers of a row
    static inline void pack_two(word* to, int64_t row, vf above, vf below) {         // of two rows, as B
        pack(to, above);
        pack(to + row, below);
    }
};

#if defined(__AVX512BF16__)
struct Pairs {  // a word is two bfloat16
    static constexpr int STEP = 2;
    static inline vf add_product(vf sum, vf a, vf b) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, bits<__m512bh>(a), bits<__m512bh>(b));
    }
    static inline void pack(word* to, vf v) {
        vh half = narrow(v);
        __builtin_memcpy(to, &half, sizeof half);
    }
    static inline void pack_two(word* to, int64_t, vf above, vf below) {
        vu pair = low_half(narrow(above)) | low_half(narrow(below)) << 16;
        __builtin_memcpy(to, &pair, sizeof pair);
    }
};
#endif

// What the elements of T are multiplied as.
template <class T> struct Words {
    typedef Singles type;
};
#if defined(__AVX512BF16__)
template <> struct Words<bf16> {
    typedef Pairs type;
};
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_COLUMNS = 4;  // vectors: 6 x 4 sums, 4 of B and one of A fill the 32 registers
#else
constexpr int MOST_COLUMNS = 2;  // of 16 registers
#endif

// Where A has zeros: beyond the diagonal that ends in its last corner, or before the one that starts in its first.
enum Zeros { NONE, LAST, FIRST };

// A: word l of row i is at[i * row + l * next].
struct Left {
    const word* at;
    int64_t row, next;
    Zeros zeros = NONE;
};

// M rows and N vectors of C. Where `start` is 0 the sums start at zero, otherwise at C, its rows times `scale` if given.
template <class P, int M, int N>
void product_tile(int64_t k, Left a, const word* b, int64_t b_row, float* c, int64_t c_row,
                  bool start, const float* scale) {
    vf sum[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            sum[i][j] = vf{};
            if (start) sum[i][j] = load(c + i * c_row + j * LANES, Whole{});
            if (start && scale) sum[i][j] *= scale[i];
        }
    for (int64_t l = 0; l < k; l++) {
        vf columns[N];
        for (int j = 0; j < N; j++) columns[j] = load((const float*)(b + l * b_row) + j * LANES, Whole{});
        for (int i = 0; i < M; i++) {
            vf row = all_words(a.at[i * a.row + l * a.next]);
            for (int j = 0; j < N; j++) sum[i][j] = P::add_product(sum[i][j], row, columns[j]);
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) store(c + i * c_row + j * LANES, sum[i][j], Whole{});
}

template <class P, int N>
void product_columns(int64_t m, int64_t k, Left a, const word* b, int64_t b_row, float* c, int64_t c_row, bool start,
                     const float* scale) {
    for (int64_t i = 0, count; i < m; i += count) {
        count = m - i >= 6 ? 6 : m - i >= 4 ? 4 : 2;
        const int64_t skip = a.zeros == FIRST ? i / P::STEP : 0;
        const int64_t length = k - skip - (a.zeros == LAST ? (m - i - count) / P::STEP : 0);
        const Left rows{a.at + i * a.row + skip * a.next, a.row, a.next};
        const word* columns = b + skip * b_row;
        float* to = c + i * c_row;
        const float* by = scale ? scale + i : nullptr;
        if (count == 6)
            product_tile<P, 6, N>(length, rows, columns, b_row, to, c_row, start, by);
        else if (count == 4)
            product_tile<P, 4, N>(length, rows, columns, b_row, to, c_row, start, by);
        else
            product_tile<P, 2, N>(length, rows, columns, b_row, to, c_row, start, by);
    }
}

// C (m, n) = A (m, k) B (k, n), added to C (its rows times `scale`, if given) where `start`. m even, n a multiple of
// LANES, k in words.
template <class P>
void product(int64_t m, int64_t n, int64_t k, Left a, const word* b, int64_t b_row, float* c, int64_t c_row, bool start,
             const float* scale = nullptr) {
    int64_t vectors = n / LANES, j = 0;
    for (; vectors - j >= MOST_COLUMNS; j += MOST_COLUMNS)
        product_columns<P, MOST_COLUMNS>(m, k, a, b + j * LANES, b_row, c + j * LANES, c_row, start, scale);
    if (MOST_COLUMNS > 2 && vectors - j >= 2) {
        product_columns<P, 2>(m, k, a, b + j * LANES, b_row, c + j * LANES, c_row, start, scale);
        j += 2;
    }
    if (vectors - j >= 1)
        product_columns<P, 1>(m, k, a, b + j * LANES, b_row, c + j * LANES, c_row, start, scale);
}

constexpr int64_t AHEAD = 12;  // rows

// A row of numbers as A.
template <class P, class T> inline void pack_row(const T* x, int64_t columns, word* to) {
    each(columns, [=](int64_t i, auto e) { P::pack(to + i / P::STEP, load(x + i, e)); });
}
#if defined(__AVX512BF16__)
template <> inline void pack_row<Pairs, bf16>(const bf16* x, int64_t columns, word* to) {
    each(columns, [=](int64_t i, auto e) {
        vh v = {};
        __builtin_memcpy(&v, x + i, e.n * sizeof(bf16));
        __builtin_memcpy(to + i / 2, &v, sizeof v);
    });
}
#endif

// The rows of x as A: to (padded_rows, padded / STEP), zero outside of (rows, columns). `padded` is the next multiple
// of 16, so the last vector of a row fills it.
template <class P, class T>
void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t padded_rows, int64_t padded, word* to) {
    const int64_t size = padded / P::STEP, written = round_up(columns, LANES) / P::STEP;
    for (int64_t r = 0; r < rows; r++) {
        prefetch(x + (r + AHEAD) * stride, columns);
        pack_row<P>(x + r * stride, columns, to + r * size);
        for (int64_t i = written; i < size; i++) to[r * size + i] = 0;
    }
    __builtin_memset(to + rows * size, 0, (padded_rows - rows) * size * sizeof(word));
}

// (rows, columns) -> (columns, rows), of words, both multiples of 4: what was packed as A becomes B of the transposed
// matrix, and what was packed as B becomes A.
inline void transpose(const word* from, int64_t rows, int64_t columns, word* to, int64_t to_row) {
    typedef float four __attribute__((vector_size(16)));
#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
    typedef int32_t places __attribute__((vector_size(16)));
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, places{i, j, k, l})
#endif
    for (int64_t c = 0; c < columns; c += 4)
        for (int64_t r = 0; r < rows; r += 4) {
            four x[4];
            for (int i = 0; i < 4; i++) __builtin_memcpy(&x[i], from + (r + i) * columns + c, sizeof x[i]);
            const four a = PICK(x[0], x[1], 0, 4, 1, 5), b = PICK(x[0], x[1], 2, 6, 3, 7);
            const four d = PICK(x[2], x[3], 0, 4, 1, 5), e = PICK(x[2], x[3], 2, 6, 3, 7);
            const four y[4] = {PICK(a, d, 0, 1, 4, 5), PICK(a, d, 2, 3, 6, 7), PICK(b, e, 0, 1, 4, 5),
                               PICK(b, e, 2, 3, 6, 7)};
            for (int i = 0; i < 4; i++) __builtin_memcpy(to + (c + i) * to_row + r, &y[i], sizeof y[i]);
        }
#undef PICK
}

// What was packed as A (rows, columns / STEP) as B of the same matrix: to (rows / STEP, columns).
template <class P> void pack_columns(const word* from, int64_t rows, int64_t columns, word* to) {
    if (P::STEP == 1) {
        __builtin_memcpy(to, from, rows * columns * sizeof(word));
        return;
    }
    const bf16* x = (const bf16*)from;
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < columns; c += LANES) {
            vh above, below;
            __builtin_memcpy(&above, x + r * columns + c, sizeof above);
            __builtin_memcpy(&below, x + (r + 1) * columns + c, sizeof below);
            const vu pair = low_half(above) | low_half(below) << 16;
            __builtin_memcpy(to + r / 2 * columns + c, &pair, sizeof pair);
        }
}

}  // namespace
