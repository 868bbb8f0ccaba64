// Causal attention over packed segments: see attention.py. Blocks of keys and queries meet in tiles that fit the cache,
// and probabilities live only there.
#include "products.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t BLOCK = 64;       // queries or keys of a tile
constexpr int64_t STRIP = 16;       // tiles on the diagonal are cut at this grain; a multiple of every LANES
constexpr int64_t MOST_SPLITS = 4;  // of a long segment's keys in backward, so that several threads can work on it
constexpr int64_t LEAST_SPLIT = 512;
constexpr float NEVER = -1e30f, LOG2_E = 1.44269504f, LOG_2 = 0.693147181f;

// A block of queries of one head. Its rows lie far apart, so they are asked for while another block is worked on.
struct Rows {
    int64_t token, count, head;
};

template <class T> struct Attention {
    typedef typename Words<T>::type P;

    const T *q, *k, *v;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides
    const int64_t* offsets;
    int64_t segments, heads, kv_heads, width, window;  // window 0: none
    float scale, softcap;                              // softcap 0: none

    int64_t group() const { return heads / kv_heads; }
    int64_t padded() const { return round_up(width, STRIP); }
    int64_t words() const { return padded() / P::STEP; }

    // Scores are kept in units of log 2, so that probabilities are powers of 2.
    float unit() const { return (softcap > 0 ? softcap : scale) * LOG2_E; }
    vf capped(vf dot) const { return softcap > 0 ? tanh(dot * (scale / softcap)) : dot; }
    // The first key that a query sees, and the first block of keys of a block of queries.
    int64_t first_key(int64_t query) const { return window > 0 && query >= window ? query - window + 1 : 0; }
    // Whether some pair of the tile is masked.
    bool masked(int64_t query, int64_t queries, int64_t key, int64_t keys) const {
        return key + keys - 1 > query || key < first_key(query + queries - 1);
    }
    // What task i starts with, if there is one.
    template <class Task> Rows first_rows(const Buffer<Task>& tasks, int64_t i, int64_t count) const {
        if (i >= count) return {};
        const Task& task = tasks.data[i];
        return {task.token + task.first, smaller(BLOCK, task.length - task.first), task.kv_head * group()};
    }
};

// ---- forward ----

struct QueryBlock {
    int64_t token, length;  // of the segment
    int64_t packed;         // where its keys start among the packed ones
    int64_t kv_head, first; // the first query of the block, from the start of the segment
};

template <class T> struct Forward : Attention<T> {
    typedef typename Attention<T>::P P;
    T* out;
    int64_t out_token, out_head;
    float* lse;  // (tokens, heads)

    // Keys and values of one block: K transposed as B (words, keys), V as B (keys / STEP, padded).
    int64_t words_of(int64_t keys) const { return keys * this->words() + keys / P::STEP * this->padded(); }

    void pack(int64_t token, int64_t keys, int64_t head, word* to, word* scratch) const {
        const int64_t wide = this->padded(), padded_keys = round_up(keys, STRIP);
        pack_rows<P>(this->k + token * this->k_token + head * this->k_head, this->k_token, keys, this->width, padded_keys,
                     wide, scratch);
        transpose(scratch, padded_keys, this->words(), to, padded_keys);
        pack_rows<P>(this->v + token * this->v_token + head * this->v_head, this->v_token, keys, this->width, padded_keys,
                     wide, scratch);
        pack_columns<P>(scratch, padded_keys, wide, to + padded_keys * this->words());
    }

    // Scores of `rows` queries become exponentials; the running maximum, sum and the factor of what was summed before.
    // Sums are kept for each lane: (rows, LANES).
    template <bool MASKED>
    void softmax(float* scores, int64_t rows, int64_t columns, int64_t query, int64_t key, word* p, float* top,
                 float* total, float* factor, const Rows& now, const Rows& next, int64_t row) const {
        const vi lane = lanes();
        const float unit = this->unit();
        for (int64_t r = 0; r < rows; r++) {
            float* s = scores + r * BLOCK;
            const int32_t end = int32_t(query + r - key), start = int32_t(this->first_key(query + r) - key);
            vf highest = all(NEVER);
            for (int64_t c = 0; c < columns; c += LANES) {
                vf v = this->capped(load(s + c, Whole{}));
                const bool cut = MASKED && (c + LANES - 1 > end || c < start);
                if (cut) {
                    vi place = lane + int32_t(c);
                    v = (place <= end) & (place >= start) ? v : all(-__builtin_inff());
                }
                highest = max(highest, v);
                if (cut || this->softcap > 0) store(s + c, v, Whole{});
            }
            const float m = larger(top[r], largest(highest) * unit);
            factor[r] = top[r] - m;
            top[r] = m;
        }
        for (int64_t r = 0; r < rows; r += LANES) store(factor + r, exp2(load(factor + r, Whole{})), Whole{});
        for (int64_t r = 0; r < rows; r++) {
            const float m = top[r];
            const int64_t i = row + r;
            if (i < now.count) prefetch(out + (now.token + i) * out_token + now.head * out_head, this->width);
            if (i < next.count)
                prefetch(this->q + (next.token + i) * this->q_token + next.head * this->q_head, this->width);
            vf sums = load(total + r * LANES, Whole{}) * factor[r];
            for (int64_t c = 0; c < columns; c += LANES) {
                vf e = exp2(load(scores + r * BLOCK + c, Whole{}) * unit - m);
                sums += e;
                P::pack(p + (r * BLOCK + c) / P::STEP, e);
            }
            store(total + r * LANES, sums, Whole{});
        }
    }

    static constexpr int64_t SCRATCH = BLOCK * BLOCK * 2 + (2 + LANES) * BLOCK;  // beside q and o

    // `later`: what this thread probably works on next.
    void run(const QueryBlock& block, const Rows& later, const word* packed, float* scratch) const {
        const int64_t wide = this->padded(), words = this->words(), group = this->group();
        const int64_t queries = smaller(BLOCK, block.length - block.first), padded_queries = round_up(queries, STRIP);
        float *scores = scratch, *o = scores + BLOCK * BLOCK, *top = o + BLOCK * wide, *total = top + BLOCK,
              *factor = total + BLOCK * LANES;
        word *p = (word*)(factor + BLOCK), *q = p + BLOCK * BLOCK;
        for (int64_t head = block.kv_head * group; head < (block.kv_head + 1) * group; head++) {
            const int64_t token = block.token + block.first;
            pack_rows<P>(this->q + token * this->q_token + head * this->q_head, this->q_token, queries, this->width,
                         padded_queries, wide, q);
            for (int64_t r = 0; r < BLOCK; r++) top[r] = NEVER;
            __builtin_memset(total, 0, BLOCK * LANES * sizeof(float));
            const Rows now{token, queries, head};
            const Rows next = head + 1 < (block.kv_head + 1) * group ? Rows{token, queries, head + 1} : later;
            bool started = false;
            for (int64_t key = this->first_key(block.first) / BLOCK * BLOCK; key < block.first + queries; key += BLOCK) {
                const int64_t keys = round_up(smaller(BLOCK, block.length - key), STRIP);
                const word *kt = packed + words_of(key), *v = kt + keys * words;
                const bool diagonal = key == block.first, masked = this->masked(block.first, queries, key, keys);
                const int64_t step = diagonal ? STRIP : padded_queries;
                for (int64_t r = 0; r < padded_queries; r += step) {
                    const int64_t seen = diagonal ? r + STRIP : keys;
                    product<P>(step, seen, words, {q + r * words, words, 1}, kt, keys, scores, BLOCK, false);
                    const int64_t query = block.first + r;
                    float* sums = total + r * LANES;
                    if (masked)
                        softmax<true>(scores, step, seen, query, key, p, top + r, sums, factor, now, next, r);
                    else
                        softmax<false>(scores, step, seen, query, key, p, top + r, sums, factor, now, next, r);
                    product<P>(step, wide, seen / P::STEP, {p, BLOCK / P::STEP, 1, diagonal ? LAST : NONE}, v, wide,
                               o + r * wide, wide, started, factor);
                }
                started = true;
            }
            for (int64_t r = 0; r < queries; r++) {
                T* to = out + (token + r) * out_token + head * out_head;
                const float sum = ::sum(load(total + r * LANES, Whole{})), inverse = 1.f / sum;
                each(this->width, [&](int64_t i, auto e) { store(to + i, load(o + r * wide + i, e) * inverse, e); });
                lse[(token + r) * this->heads + head] = top[r] * LOG_2 + __builtin_logf(sum);
            }
        }
    }

    void operator()(int64_t threads) const {
        int64_t blocks = 0, keys = 0;
        for (int64_t s = 0; s < this->segments; s++) {
            const int64_t n = this->offsets[s + 1] - this->offsets[s];
            blocks += (n + BLOCK - 1) / BLOCK;
            keys += round_up(n, STRIP);
        }
        const int64_t head_words = words_of(keys);
        Buffer<QueryBlock> tasks(blocks * this->kv_heads);
        Buffer<word> packed(head_words * this->kv_heads);
        int64_t count = 0, start = 0;
        for (int64_t s = 0; s < this->segments; s++) {
            const int64_t token = this->offsets[s], n = this->offsets[s + 1] - token;
            for (int64_t h = 0; h < this->kv_heads; h++)
                for (int64_t first = (n - 1) / BLOCK * BLOCK; n > 0 && first >= 0; first -= BLOCK)
                    tasks.data[count++] = {token, n, start, h, first};
            start += round_up(n, STRIP);
        }
        const int64_t wide = this->padded();
        parallel(threads, count, BLOCK * wide, [&](int64_t i, float* scratch) {
            const QueryBlock& b = tasks.data[i];
            pack(b.token + b.first, smaller(BLOCK, b.length - b.first), b.kv_head,
                 packed.data + b.kv_head * head_words + words_of(b.packed + b.first), (word*)scratch);
        });
        parallel(threads, count, SCRATCH + 2 * BLOCK * wide, [&](int64_t i, float* scratch) {
            const QueryBlock& b = tasks.data[i];
            const word* keys = packed.data + b.kv_head * head_words + words_of(b.packed);
            run(b, this->first_rows(tasks, i + threads, count), keys, scratch);
        });
    }
};

// ---- backward ----

struct KeyRange {
    int64_t token, length;  // of the segment
    int64_t kv_head, first, last;
    int64_t partial;  // where this part's gradients of the segment's queries are kept, or -1: written to the result
};

template <class T> struct Backward : Attention<T> {
    typedef typename Attention<T>::P P;
    const T *out, *grad;
    int64_t out_token, out_head, grad_token, grad_head;
    const float* lse;
    T *grad_q, *grad_k, *grad_v;
    int64_t gq_token, gq_head, gk_token, gk_head, gv_token, gv_head;

    // What a thread works in. Of keys: all of the range; of queries: one block.
    struct Scratch {
        word *k_transposed, *v_transposed, *k;     // B (words, keys of a block) twice, B (keys / STEP, padded)
        float *grad_k, *grad_v;                    // (keys, padded)
        word *q, *grad;                            // A (BLOCK, words)
        word *q_columns, *grad_columns;            // B (BLOCK / STEP, padded)
        float *delta, *lse, *scores, *grad_scores; // (BLOCK), (BLOCK), (BLOCK queries, BLOCK keys) twice
        word *ds, *ds_columns, *p_columns;         // A (BLOCK, BLOCK / STEP), B (BLOCK / STEP, BLOCK) twice
        float* grad_q;                             // (BLOCK, padded)

        Scratch(float* memory, int64_t keys, int64_t wide, int64_t words, int64_t& size) {
            int64_t at = 0;
            auto take = [&](int64_t count) {
                float* place = memory ? memory + at : nullptr;
                at += round_up(count, 16);
                return place;
            };
            // Where a word is one number, A and B are the same.
            auto columns = [&](word* rows, int64_t count) { return P::STEP == 1 ? rows : (word*)take(count); };
            k_transposed = (word*)take(keys * words), v_transposed = (word*)take(keys * words);
            k = (word*)take(keys * words);
            grad_k = take(keys * wide), grad_v = take(keys * wide);
            q = (word*)take(BLOCK * words), grad = (word*)take(BLOCK * words);
            q_columns = columns(q, BLOCK * words), grad_columns = columns(grad, BLOCK * words);
            delta = take(BLOCK), lse = take(BLOCK), scores = take(BLOCK * BLOCK), grad_scores = take(BLOCK * BLOCK);
            ds = (word*)take(BLOCK * BLOCK / P::STEP), ds_columns = columns(ds, BLOCK * BLOCK / P::STEP);
            p_columns = (word*)take(BLOCK * BLOCK / P::STEP);
            grad_q = take(BLOCK * wide);
            size = at;
        }
    };

    void pack_keys(const KeyRange& range, int64_t keys, Scratch& s) const {
        const int64_t token = range.token + range.first, count = range.last - range.first, wide = this->padded();
        word *k = (word*)s.grad_k, *v = (word*)s.grad_v;  // there is room until sums start there
        pack_rows<P>(this->k + token * this->k_token + range.kv_head * this->k_head, this->k_token, count, this->width,
                     keys, wide, k);
        pack_rows<P>(this->v + token * this->v_token + range.kv_head * this->v_head, this->v_token, count, this->width,
                     keys, wide, v);
        for (int64_t at = 0; at < keys; at += BLOCK) {
            const int64_t size = smaller(BLOCK, keys - at), place = at * this->words();
            transpose(k + place, size, this->words(), s.k_transposed + place, size);
            transpose(v + place, size, this->words(), s.v_transposed + place, size);
        }
        pack_columns<P>(k, keys, wide, s.k);
        __builtin_memset(s.grad_k, 0, keys * wide * sizeof(float));
        __builtin_memset(s.grad_v, 0, keys * wide * sizeof(float));
    }

    void pack_queries(int64_t token, int64_t queries, int64_t head, Scratch& s) const {
        const int64_t padded = round_up(queries, STRIP), wide = this->padded();
        const T *d = grad + token * grad_token + head * grad_head, *o = out + token * out_token + head * out_head;
        pack_rows<P>(this->q + token * this->q_token + head * this->q_head, this->q_token, queries, this->width, padded,
                     wide, s.q);
        pack_rows<P>(d, grad_token, queries, this->width, padded, wide, s.grad);
        if (P::STEP > 1) {
            pack_columns<P>(s.q, padded, wide, s.q_columns);
            pack_columns<P>(s.grad, padded, wide, s.grad_columns);
        }
        for (int64_t r = 0; r < padded; r++) {
            vf total = {};
            prefetch(o + (r + AHEAD) * out_token, this->width);
            if (r < queries)
                each(this->width, [&](int64_t i, auto e) {
                    total += load(d + r * grad_token + i, e) * load(o + r * out_token + i, e);
                });
            s.delta[r] = ::sum(total);
            // Padding gets probability 0.
            s.lse[r] = r < queries ? lse[(token + r) * this->heads + head] * LOG2_E : -NEVER;
        }
    }

    // Products of queries and keys, and of gradients and values, become probabilities and the gradient of the scores;
    // the gradients of queries and keys are multiplied by the scale at the end.
    template <bool MASKED>
    void softmax(Scratch& s, int64_t row, int64_t rows, int64_t columns, int64_t query, int64_t key, const Rows& now,
                 const Rows& next) const {
        const vi lane = lanes();
        const float unit = this->unit();
        for (int64_t r = row; r < row + rows; r += 2) {
            for (int64_t i = r; i < r + 2; i++) {
                if (i < now.count) prefetch(grad_q + (now.token + i) * gq_token + now.head * gq_head, this->width);
                if (i >= next.count) continue;
                const int64_t token = next.token + i;
                prefetch(this->q + token * this->q_token + next.head * this->q_head, this->width);
                prefetch(grad + token * grad_token + next.head * grad_head, this->width);
                prefetch(out + token * out_token + next.head * out_head, this->width);
            }
            for (int64_t c = 0; c < columns; c += LANES) {
                vf p[2], ds[2];
                for (int64_t i = 0; i < 2; i++) {
                    const int64_t place = (r + i) * BLOCK + c;
                    const int32_t end = int32_t(query + r + i - key);
                    const int32_t start = int32_t(this->first_key(query + r + i) - key);
                    vf z = this->capped(load(s.scores + place, Whole{}));
                    p[i] = exp2(z * unit - s.lse[r + i]);
                    if (MASKED && (c + LANES - 1 > end || c < start)) {
                        const vi seen = lane + int32_t(c);
                        p[i] = (seen <= end) & (seen >= start) ? p[i] : vf{};
                    }
                    ds[i] = p[i] * (load(s.grad_scores + place, Whole{}) - s.delta[r + i]);
                    if (this->softcap > 0) ds[i] *= 1.f - z * z;
                    if (P::STEP > 1) P::pack(s.ds + place / P::STEP, ds[i]);
                }
                P::pack_two(s.p_columns + r / P::STEP * BLOCK + c, BLOCK, p[0], p[1]);
                P::pack_two(s.ds_columns + r / P::STEP * BLOCK + c, BLOCK, ds[0], ds[1]);
            }
        }
    }

    // One block of keys, at `at` of the range, with one block of queries.
    void tile(Scratch& s, int64_t at, int64_t key, int64_t keys, int64_t query, int64_t queries,
              bool started, const Rows& now, const Rows& next) const {
        const int64_t wide = this->padded(), words = this->words(), row = BLOCK / P::STEP;
        const bool diagonal = key == query, masked = this->masked(query, queries, key, keys);
        int64_t step = diagonal ? STRIP : queries;
        for (int64_t r = 0; r < queries; r += step) {
            const int64_t seen = diagonal ? r + STRIP : keys;
            product<P>(step, seen, words, {s.q + r * words, words, 1}, s.k_transposed + at * words, keys,
                       s.scores + r * BLOCK, BLOCK, false);
            product<P>(step, seen, words, {s.grad + r * words, words, 1}, s.v_transposed + at * words, keys,
                       s.grad_scores + r * BLOCK, BLOCK, false);
            if (masked)
                softmax<true>(s, r, step, seen, query, key, now, next);
            else
                softmax<false>(s, r, step, seen, query, key, now, next);
            product<P>(step, wide, seen / P::STEP, {s.ds + r * row, row, 1, diagonal ? LAST : NONE},
                       s.k + at / P::STEP * wide, wide, s.grad_q + r * wide, wide, started);
        }
        step = diagonal ? STRIP : keys;
        for (int64_t c = 0; c < keys; c += step) {  // strips, for what lies beyond them was not computed
            const int64_t from = (diagonal ? c : 0) / P::STEP, count = queries / P::STEP - from, place = (at + c) * wide;
            const Left p{s.p_columns + from * BLOCK + c, 1, BLOCK, diagonal ? FIRST : NONE};
            const Left ds{s.ds_columns + from * BLOCK + c, 1, BLOCK, p.zeros};
            product<P>(step, wide, count, p, s.grad_columns + from * wide, wide, s.grad_v + place, wide, true);
            product<P>(step, wide, count, ds, s.q_columns + from * wide, wide, s.grad_k + place, wide, true);
        }
    }

    void run(const KeyRange& range, const Rows& later, float* partial, float* memory) const {
        const int64_t wide = this->padded(), group = this->group(), keys = round_up(range.last - range.first, STRIP);
        int64_t size;
        Scratch s(memory, keys, wide, this->words(), size);
        pack_keys(range, keys, s);
        int64_t end = range.length;  // of the queries that see these keys
        if (this->window > 0) end = smaller(end, range.last + this->window - 1);
        for (int64_t head = range.kv_head * group; head < (range.kv_head + 1) * group; head++)
            for (int64_t query = range.first; query < range.length; query += BLOCK) {
                const int64_t queries = smaller(BLOCK, range.length - query), token = range.token + query;
                const int64_t padded = round_up(queries, STRIP);
                const bool more = query + BLOCK < range.length;
                const int64_t then = more ? query + BLOCK : range.first;
                const Rows next = more || head + 1 < (range.kv_head + 1) * group
                                      ? Rows{range.token + then, smaller(BLOCK, range.length - then), head + !more}
                                      : later;
                bool started = false;
                if (query < end) {
                    pack_queries(token, queries, head, s);
                    const int64_t seen = larger(range.first, this->first_key(query) / BLOCK * BLOCK);
                    for (int64_t key = seen; key < smaller(query + queries, range.last); key += BLOCK) {
                        tile(s, key - range.first, key, smaller(BLOCK, round_up(range.length - key, STRIP)), query,
                             padded, started, {token, queries, head}, next);
                        started = true;
                    }
                }
                if (!started) __builtin_memset(s.grad_q, 0, BLOCK * wide * sizeof(float));
                for (int64_t r = 0; r < queries; r++) {
                    const float* from = s.grad_q + r * wide;
                    if (range.partial < 0)
                        copy(from, this->scale, grad_q + (token + r) * gq_token + head * gq_head);
                    else
                        copy(from, this->scale, partial + range.partial + (head * range.length + query + r) * this->width);
                }
            }
        for (int64_t r = 0; r < range.last - range.first; r++) {
            const int64_t token = range.token + range.first + r;
            T* to_k = grad_k + token * gk_token + range.kv_head * gk_head;
            T* to_v = grad_v + token * gv_token + range.kv_head * gv_head;
            prefetch(to_k + AHEAD * gk_token, this->width);
            prefetch(to_v + AHEAD * gv_token, this->width);
            copy(s.grad_k + r * wide, this->scale, to_k);
            copy(s.grad_v + r * wide, 1.f, to_v);
        }
    }

    template <class To> void copy(const float* from, float factor, To* to) const {
        each(this->width, [=](int64_t i, auto e) { store(to + i, load(from + i, e) * factor, e); });
    }

    // Into how many ranges the keys of a segment are cut: by its length alone, so that sums do not depend on threads.
    static int64_t splits(int64_t length) { return larger<int64_t>(1, smaller(MOST_SPLITS, length / LEAST_SPLIT)); }
    static int64_t split_size(int64_t length) { return round_up((length + splits(length) - 1) / splits(length), BLOCK); }

    // The sum of the parts that the ranges of a long segment found for one query head.
    void gather(const KeyRange& range, int64_t head, const float* partial) const {
        const int64_t size = this->heads * range.length * this->width, step = split_size(range.length);
        for (int64_t r = 0; r < range.length; r++) {
            T* to = grad_q + (range.token + r) * gq_token + head * gq_head;
            const float* from = partial + range.partial + (head * range.length + r) * this->width;
            each(this->width, [&](int64_t i, auto e) {
                vf total = {};
                for (int64_t split = 0; split * step <= r; split++) total += load(from + split * size + i, e);
                store(to + i, total, e);
            });
        }
    }

    void operator()(int64_t threads) const {
        int64_t most = 0, longest = 0, partials = 0, count = 0, split = 0;
        for (int64_t s = 0; s < this->segments; s++) most += splits(this->offsets[s + 1] - this->offsets[s]);
        Buffer<KeyRange> tasks(most * this->kv_heads), long_segments(this->segments * this->heads);
        for (int64_t s = 0; s < this->segments; s++) {
            const int64_t token = this->offsets[s], n = this->offsets[s + 1] - token, step = split_size(n);
            if (splits(n) > 1)
                for (int64_t h = 0; h < this->heads; h++) long_segments.data[split++] = {token, n, h, 0, n, partials};
            for (int64_t first = 0; first < n; first += step) {
                const int64_t last = smaller(first + step, n);
                for (int64_t h = 0; h < this->kv_heads; h++)
                    tasks.data[count++] = {token, n, h, first, last, splits(n) > 1 ? partials : -1};
                longest = larger(longest, round_up(last - first, STRIP));
                if (splits(n) > 1) partials += this->heads * n * this->width;
            }
        }
        int64_t scratch;
        Scratch(nullptr, longest, this->padded(), this->words(), scratch);
        Buffer<float> partial(partials);
        parallel(threads, count, scratch, [&](int64_t i, float* memory) {
            run(tasks.data[i], this->first_rows(tasks, i + threads, count), partial.data, memory);
        });
        parallel(threads, split, [&](int64_t i) {
            gather(long_segments.data[i], long_segments.data[i].kv_head, partial.data);
        });
    }
};

}  // namespace

#define EXPORT_FOR(T, type)                                                                                            \
    EXPORT(attention_##type)(const T* q, int64_t q_token, int64_t q_head, const T* k, int64_t k_token, int64_t k_head, \
                             const T* v, int64_t v_token, int64_t v_head, const int64_t* offsets, int64_t segments,    \
                             int64_t heads, int64_t kv_heads, int64_t width, int64_t window, float scale,              \
                             float softcap, T* out, int64_t out_token, int64_t out_head, float* lse,                   \
                             int64_t threads) {                                                                        \
        Forward<T> work{{q,      k,       v,        q_token, q_head,   k_token, k_head, v_token, v_head,               \
                         offsets, segments, heads,  kv_heads, width, window, scale,   softcap},                        \
                        out, out_token, out_head, lse};                                                                \
        work(threads);                                                                                                 \
    }                                                                                                                  \
    EXPORT(attention_backward_##type)(const T* q, int64_t q_token, int64_t q_head, const T* k, int64_t k_token,        \
                                      int64_t k_head, const T* v, int64_t v_token, int64_t v_head,                     \
                                      const int64_t* offsets, int64_t segments, int64_t heads, int64_t kv_heads,       \
                                      int64_t width, int64_t window, float scale, float softcap, const T* out,         \
                                      int64_t out_token, int64_t out_head, const float* lse, const T* grad,            \
                                      int64_t grad_token, int64_t grad_head, T* grad_q, int64_t gq_token,              \
                                      int64_t gq_head, T* grad_k, int64_t gk_token, int64_t gk_head, T* grad_v,        \
                                      int64_t gv_token, int64_t gv_head, int64_t threads) {                            \
        Backward<T> work{{q,      k,       v,        q_token, q_head,   k_token, k_head, v_token, v_head,              \
                          offsets, segments, heads,  kv_heads, width, window, scale,   softcap},                       \
                         out,      grad,   out_token, out_head, grad_token, grad_head, lse,    grad_q,                 \
                         grad_k,   grad_v, gq_token,  gq_head,  gk_token,   gk_head,   gv_token, gv_head};             \
        work(threads);                                                                                                 \
    }
EXPORT_FOR(float, float32)
EXPORT_FOR(bf16, bfloat16)
