// Vectors of LANES floats on the vector extensions of GCC and Clang, for the instruction set that SMIDGEN_ISA_* names.
//
// Every other source is compiled once per instruction set, so nothing here or there may be an inline function of the
// standard library with external linkage: the linker would keep one copy of it, perhaps one that this machine lacks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define SMIDGEN_PASTE(isa, name) smidgen_##isa##_##name
#define SMIDGEN_NAME(isa, name) SMIDGEN_PASTE(isa, name)
// The C function `name` as it is called from outside: smidgen_avx2_name for the instruction set avx2.
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) void SMIDGEN_NAME(SMIDGEN_ISA, name)

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

template <class T> inline T smaller(T a, T b) { return a < b ? a : b; }
template <class T> inline T larger(T a, T b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline vf min(vf a, vf b) { return a < b ? a : b; }
inline vf max(vf a, vf b) { return a > b ? a : b; }

template <class To, class From> inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
    To to;
    __builtin_memcpy(&to, &value, sizeof to);
    return to;
}

// x in every lane. A sum of whole numbers, for 0 + x of floats is no copy of x to a compiler that minds -0.
inline vf all(float x) { return bits<vf>(vi{} + bits<int32_t>(x)); }

inline vi lanes() {
    vi v;
    for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}

// How much of a vector lies inside the row: all of it, or the first `n` lanes. What lies outside is read as zero.
struct Whole {
    static constexpr int n = LANES;
};
struct Part {
    int n;
};

// Ask for a row of `columns` numbers that is read soon: rows of one head lie too far apart for the machine to guess.
template <class T> inline void prefetch(const T* x, int64_t columns) {
    for (int64_t i = 0; i < columns; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + i);
}

// f(i, extent) for i = 0, LANES, 2 LANES... below n.
template <class F> inline void each(int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, Whole{});
    if (i < n) f(i, Part{int(n - i)});
}

// 16 bits in the low half of 32. GCC 12 would make two halves of the conversion.
inline vu low_half(vh v) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, vu);
#endif
}

inline vf widen(vh half) { return bits<vf>(low_half(half) << 16); }

// To the nearest bfloat16, ties to even. The instruction takes subnormal numbers as zero.
inline vh narrow(vf x) {
#if defined(__AVX512BF16__)
    return bits<vh>(_mm512_cvtneps_pbh((__m512)x));
#else
    vu u = bits<vu>(x);
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : (u >> 16) | 0x40, vh);
#endif
}

template <class E> inline vf load(const float* p, E extent) {
    vf v = {};
    __builtin_memcpy(&v, p, extent.n * sizeof(float));
    return v;
}
template <class E> inline vf load(const bf16* p, E extent) {
    vh v = {};
    __builtin_memcpy(&v, p, extent.n * sizeof(bf16));
    return widen(v);
}
template <class E> inline void store(float* p, vf v, E extent) { __builtin_memcpy(p, &v, extent.n * sizeof(float)); }
template <class E> inline void store(bf16* p, vf v, E extent) {
    vh half = narrow(v);
    __builtin_memcpy(p, &half, extent.n * sizeof(bf16));
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }
template <class T> inline void set(T* p, float x) { store(p, all(x), Part{1}); }

// v as an element of T would hold it.
template <class T> inline vf rounded(vf v);
template <> inline vf rounded<float>(vf v) { return v; }
template <> inline vf rounded<bf16>(vf v) { return widen(narrow(v)); }

// Lanes outside of the extent become `other`.
inline vf keep(vf v, Whole, float) { return v; }
inline vf keep(vf v, Part extent, float other) {
    for (int i = extent.n; i < LANES; i++) v[i] = other;
    return v;
}

// f over all lanes: of each and the one LANES / 2 away, then LANES / 4...
template <int AWAY = LANES / 2, class Fold> inline float fold(vf v, Fold f) {
#if defined(__clang__)
    vf other;
    for (int i = 0; i < LANES; i++) other[i] = v[i ^ AWAY];
#else
    const vf other = __builtin_shuffle(v, lanes() ^ AWAY);  // GCC makes no shuffle of the loop
#endif
    v = f(v, other);
    if constexpr (AWAY == 1)
        return v[0];
    else
        return fold<AWAY / 2>(v, f);
}
inline float sum(vf v) {
    return fold(v, [](vf a, vf b) { return a + b; });
}
inline float largest(vf v) {
    return fold(v, [](vf a, vf b) { return max(a, b); });
}

// The blocks of STEP lanes at even places, or at odd ones, of a and b in turn.
template <int STEP, int ODD, int... I> inline vf blocks(vf a, vf b, std::integer_sequence<int, I...>) {
    return vf{(I / STEP % 2 ? b : a)[I / (2 * STEP) * (2 * STEP) + ODD * STEP + I % STEP]...};
}

// The sums of the lanes of R vectors, at most LANES: that of v[0] in lane 0, of v[1] in lane 1...
template <int R, int STEP = 1> inline vf sums(const vf* v) {
    if constexpr (STEP == LANES) {
        return v[0];
    } else {
        constexpr std::make_integer_sequence<int, LANES> all_lanes{};
        vf half[(R + 1) / 2];
        for (int r = 0; r < R; r += 2) {
            const vf a = v[r], b = v[smaller(r + 1, R - 1)];
            half[r / 2] = blocks<STEP, 0>(a, b, all_lanes) + blocks<STEP, 1>(a, b, all_lanes);
        }
        return sums<(R + 1) / 2, 2 * STEP>(half);
    }
}

// e^x within 2 units in the last place; 0 below -87.3, where float32 ends.
inline vf exp(vf x) {
    const vf low = all(-87.33654f), high = all(88.37626f);
    vf y = x < low ? low : x > high ? high : x;  // a NaN stays one
    const float magic = 12582912.f;              // 1.5 * 2^23: adding it rounds to a whole number
    vf shifted = y * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = y - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    vf power = bits<vf>((bits<vi>(shifted) - 0x4B400000 + 127) << 23);
    return x < low ? vf{} : p * power;
}

// 2^x for x up to 0, within 2 units in the last place; 0 below -126.5 (coefficients: Cephes, exp2f).
inline vf exp2(vf x) {
    const float magic = 12582912.f;
    vf y = max(all(-127.f), x);  // a NaN stays one
    vf shifted = y + magic;
    vf r = y - (shifted - magic);
    vf p = all(1.535336188e-4f);
    p = p * r + 1.339887440e-3f;
    p = p * r + 9.618437358e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.f;
    vf power = bits<vf>((bits<vi>(shifted) - 0x4B400000 + 127) << 23);
    return p * power;  // of -127: 0
}

inline vf sigmoid(vf x) { return 1.f / (1.f + exp(-x)); }

// Near zero a series, for 1 - 2 / (e^2x + 1) cancels there.
inline vf tanh(vf x) {
    vf square = x * x;
    vf near = x * (1.f + square * (-0.333333333f + square * (0.133333333f + square * -0.0539682540f)));
    return square < 0.01f ? near : 1.f - 2.f / (exp(2.f * x) + 1.f);
}

// The normal distribution function, by the Chebyshev fit of erfc with a relative error of 1.2e-7
// (Press et al., Numerical Recipes, section 6.2).
inline vf normal_cdf(vf x) {
    vf z = (x < 0.f ? -x : x) * 0.70710678f;
    vf t = 1.f / (1.f + 0.5f * z);
    vf p = all(0.17087277f);
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    vf tail = 0.5f * t * exp(p - z * z);
    return x < 0.f ? tail : 1.f - tail;
}

}  // namespace
