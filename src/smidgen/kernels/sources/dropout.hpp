// The mask of dropout as a function of the seed and of the place: see dropout.py for the definition.
#pragma once
#include "vectors.hpp"

namespace {

struct Mask {
    uint32_t key0, key1;
    int32_t threshold;  // 0: nothing is dropped
    float scale;

    Mask(int64_t seed, int64_t threshold)
        : key0(uint32_t(seed)), key1(uint32_t(uint64_t(seed) >> 32)), threshold(int32_t(threshold)),
          scale(65536.f / float(65536 - threshold)) {}

    // Where the counter of a row of so many columns starts.
    static uint32_t counter(int64_t row, int64_t columns) { return uint32_t(row * ((columns + 31) / 32) * 16); }

    // Which elements stay of the vector that starts at the counter's column, and of that 16 columns further on.
    struct Stays {
        vi near, far;
    };
    Stays stays(uint32_t counter) const {
        vu x = ((vu)lanes() * 0x9E3779B9u + counter * 0x9E3779B9u) ^ key0;
        x = (x ^ (x >> 16)) * 0x7FEB352Du;
        x = ((x ^ (x >> 15)) + key1) * 0x846CA68Bu;
        return {(vi)((x ^ (x >> 16)) & 0xffff) >= threshold, (vi)(x >> 16) >= threshold};
    }
};

// f(i, counter, near, far) for each pair of vectors of a row that one vector of random words decides on: at column i and
// at i + 16. `near` and `far` say how much of them lies inside the row, `counter` is counted from that of the row.
template <class F> inline void each_pair(int64_t columns, F f) {
    int64_t block = 0;
    for (; block + 32 <= columns; block += 32)
        for (int word = 0; word < 16; word += LANES) f(block + word, uint32_t(block / 2 + word), Whole{}, Whole{});
    for (int word = 0; word < 16 && block + word < columns; word += LANES) {
        const int64_t inside = columns - block - word;
        const auto part = [](int64_t n) { return Part{int(larger<int64_t>(0, smaller<int64_t>(n, LANES)))}; };
        f(block + word, uint32_t(block / 2 + word), part(inside), part(inside - 16));
    }
}

}  // namespace
