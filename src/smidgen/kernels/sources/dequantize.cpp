// Weights that are stored in 4 or 8 bits made dense: see dequantize.py for how they are stored.
#include "threads.hpp"
#include "vectors.hpp"

namespace {

// The scale of each block, as it is or from 8 bits.
struct Scales {
    const float* plain;  // null where they are nested
    const uint8_t* codes;
    const float *scales, *book;
    float offset;

    float operator[](int64_t block) const {
        if (plain) return plain[block];
        volatile float product = book[codes[block]] * scales[block / 256];  // not fused with the sum: rounded twice
        return product + offset;
    }
};

// What the codes of one block stand for.
template <class T> struct Table {
    static constexpr int STEP = 32;  // numbers, two to a byte, which divides every whole block
    alignas(64) T values[32];        // the 16 twice, as a look-up by 5 bits wants them

    Table(const float* book, float scale) {
        for (int i = 0; i < 32; i += LANES) store(values + i, load(book + i % 16, Whole{}) * scale, Whole{});
    }
    T first(uint8_t pair) const { return values[pair >> 4]; }
    T second(uint8_t pair) const { return values[pair & 15]; }

    // STEP numbers. Vectors take the first of a pair from the high half of its byte, the second from all of it, for
    // only the low bits of an index count.
    void look_up(const uint8_t* codes, T* y) const;
};

#if defined(__AVX512F__)
template <> void Table<float>::look_up(const uint8_t* codes, float* y) const {
    for (int i = 0; i < STEP; i += 16) {
        const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(codes + i / 2)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(pairs, 4), _mm512_slli_epi64(pairs, 32));
        _mm512_storeu_ps(y + i, _mm512_permutexvar_ps(index, _mm512_load_ps(values)));
    }
}
template <> void Table<bf16>::look_up(const uint8_t* codes, bf16* y) const {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(pairs, 4), _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(y, _mm512_permutexvar_epi16(index, _mm512_load_si512(values)));
}
#elif defined(__AVX2__)
template <> void Table<float>::look_up(const uint8_t* codes, float* y) const {
    const __m256 low = _mm256_load_ps(values), high = _mm256_load_ps(values + 8);
    for (int i = 0; i < STEP; i += 8) {
        int32_t four;
        __builtin_memcpy(&four, codes + i / 2, 4);
        const __m256i pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        const __m256i index = _mm256_or_si256(_mm256_srli_epi64(pairs, 4), _mm256_slli_epi64(pairs, 32));
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // by the sign: bit 3 of the index
        _mm256_storeu_ps(y + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                 _mm256_permutevar8x32_ps(high, index), upper));
    }
}
template <> void Table<bf16>::look_up(const uint8_t* codes, bf16* y) const {
    // Sixteen numbers by their bytes: all low ones, all high ones, then side by side.
    const __m256i bytes = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12,
                                           14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m256i split = _mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)values), bytes);
    const __m256i sorted = _mm256_permute4x64_epi64(split, 0xD8);
    const __m128i low = _mm256_castsi256_si128(sorted), high = _mm256_extracti128_si256(sorted, 1);
    const __m128i pairs = _mm_loadu_si128((const __m128i*)codes), half = _mm_set1_epi8(15);
    const __m128i first = _mm_and_si128(_mm_srli_epi16(pairs, 4), half), second = _mm_and_si128(pairs, half);
    for (int i = 0; i < 2; i++) {
        const __m128i index = i ? _mm_unpackhi_epi8(first, second) : _mm_unpacklo_epi8(first, second);
        const __m128i a = _mm_shuffle_epi8(low, index), b = _mm_shuffle_epi8(high, index);
        _mm_storeu_si128((__m128i*)(y + 16 * i), _mm_unpacklo_epi8(a, b));
        _mm_storeu_si128((__m128i*)(y + 16 * i + 8), _mm_unpackhi_epi8(a, b));
    }
}
#else
template <class T> void Table<T>::look_up(const uint8_t* codes, T* y) const {
    for (int i = 0; i < STEP; i += 2) {
        y[i] = first(codes[i / 2]);
        y[i + 1] = second(codes[i / 2]);
    }
}
#endif

template <class T>
void blocks(const uint8_t* codes, const Scales& scales, const float* book, T* y, int64_t count, int64_t size,
            int64_t threads) {
    parallel_rows(threads, (count + size - 1) / size, size, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; block++) {
            const Table<T> table(book, scales[block]);
            const int64_t end = smaller((block + 1) * size, count);
            int64_t i = block * size;
            for (; i + Table<T>::STEP <= end; i += Table<T>::STEP) table.look_up(codes + i / 2, y + i);
            for (; i < end; i++) y[i] = i % 2 ? table.second(codes[i / 2]) : table.first(codes[i / 2]);
        }
    });
}

typedef int8_t vb __attribute__((vector_size(LANES)));
template <class E> inline vf load(const int8_t* p, E extent) {
    vb v = {};
    __builtin_memcpy(&v, p, extent.n);
#if defined(__AVX512F__)  // GCC 12 would convert in halves and quarters
    const vi whole = (vi)_mm512_cvtepi8_epi32((__m128i)v);
#elif defined(__AVX2__)
    const vi whole = (vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits<int64_t>(v)));
#else
    const vi whole = __builtin_convertvector(v, vi);
#endif
    return __builtin_convertvector(whole, vf);
}

template <class T>
void rows(const int8_t* codes, const float* scales, T* y, int64_t rows, int64_t columns, float step, int64_t threads) {
    parallel_rows(threads, rows, columns, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const int8_t* from = codes + row * columns;
            T* to = y + row * columns;
            const float scale = scales[row];
            each(columns, [=](int64_t i, auto e) { store(to + i, load(from + i, e) * scale * step, e); });
        }
    });
}

}  // namespace

#define EXPORT_FOR(T, type)                                                                                            \
    EXPORT(dequantize_blocks_##type)(const uint8_t* codes, const float* plain, const uint8_t* scale_codes,             \
                                     const float* scales, const float* scale_book, float offset, const float* book,    \
                                     T* y, int64_t count, int64_t size, int64_t threads) {                             \
        blocks(codes, Scales{plain, scale_codes, scales, scale_book, offset}, book, y, count, size, threads);          \
    }                                                                                                                  \
    EXPORT(dequantize_rows_##type)(const int8_t* codes, const float* scales, T* y, int64_t row_count, int64_t columns, \
                                   float step, int64_t threads) {                                                      \
        rows(codes, scales, y, row_count, columns, step, threads);                                                     \
    }
EXPORT_FOR(float, float32)
EXPORT_FOR(bf16, bfloat16)
