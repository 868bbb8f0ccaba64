// Work shared by the threads that PyTorch's own operations run on.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Call run(data) on `threads` threads at once, this one among them.
extern "C" void smidgen_fork(int threads, void (*run)(void*), void* data);

namespace {

// Memory that is given back at the end, for `count` numbers; aligned for every vector.
template <class T> struct Buffer {
    T* data;
    explicit Buffer(int64_t count) : data(static_cast<T*>(aligned_alloc(64, (size_t(count) * sizeof(T) + 127) / 64 * 64))) {
        if (!data) {
            fprintf(stderr, "smidgen: no memory for %lld bytes\n", (long long)(count * int64_t(sizeof(T))));
            abort();
        }
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// body(i, scratch) for i = 0 ... tasks - 1, where each thread has `scratch` floats of its own. Threads take the next
// task when they are done with one, in order, so the results may not depend on which thread did what.
template <class Body> void parallel(int64_t threads, int64_t tasks, int64_t scratch, const Body& body) {
    struct Work {
        const Body& body;
        int64_t tasks, scratch, next;
        static void run(void* data) {
            Work& work = *static_cast<Work*>(data);
            Buffer<float> own(work.scratch);
            for (int64_t i; (i = __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED)) < work.tasks;)
                work.body(i, own.data);
        }
    } work{body, tasks, scratch, 0};
    if (tasks < threads) threads = tasks;
    if (threads > 1)
        smidgen_fork(int(threads), Work::run, &work);
    else
        Work::run(&work);
}

// The same without memory: body(i).
template <class Body> void parallel(int64_t threads, int64_t tasks, const Body& body) {
    parallel(threads, tasks, 0, [&](int64_t i, float*) { body(i); });
}

// body(first, last) over `rows` rows of `columns` numbers, in pieces that are worth waking a thread for.
template <class Body> void parallel_rows(int64_t threads, int64_t rows, int64_t columns, const Body& body) {
    int64_t piece = 16384 / (columns > 0 ? columns : 1) + 1;
    parallel(threads, (rows + piece - 1) / piece,
             [&](int64_t i) { body(i * piece, (i + 1) * piece < rows ? (i + 1) * piece : rows); });
}

}  // namespace
