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

    vu hash(vu counter) const {
        vu x = (counter * 0x9E3779B9u) ^ key0;
        x = (x ^ (x >> 16)) * 0x7FEB352Du;
        x = ((x ^ (x >> 15)) + key1) * 0x846CA68Bu;
        return x ^ (x >> 16);
    }

    // f(i, factor, extent) for each vector of a row, where factor is 0 or the scale.
    template <class F> void row(int64_t row, int64_t columns, F f) const {
        const vu lane = (vu)lanes();
        uint32_t counter = uint32_t(row * ((columns + 31) / 32) * 16);
        for (int64_t block = 0; block < columns; block += 32, counter += 16)
            for (int word = 0; word < 16; word += LANES) {
                const vu random = hash(lane + (counter + word));
                const vi low = (vi)(random & 0xffff) >= threshold, high = (vi)(random >> 16) >= threshold;
                place(block + word, columns, low, f);
                place(block + word + 16, columns, high, f);
            }
    }

  private:
    template <class F> void place(int64_t i, int64_t columns, vi keep, F f) const {
        const vf factor = keep ? all(scale) : vf{};
        if (i + LANES <= columns)
            f(i, factor, Whole{});
        else if (i < columns)
            f(i, factor, Part{int(columns - i)});
    }
};

}  // namespace
