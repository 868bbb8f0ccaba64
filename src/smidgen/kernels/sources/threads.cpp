// What is compiled once: the threads, and which instruction sets this machine has.
#include "threads.hpp"

#include <cstring>
#include <thread>
#include <vector>

#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace {
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel runtime_parallel = nullptr;
}  // namespace

// Use this GOMP_parallel, the entry of the OpenMP runtime that PyTorch has loaded: its threads are awake already, and a
// second set of them would fight for the cores.
PUBLIC void smidgen_use_runtime(void* entry) { runtime_parallel = reinterpret_cast<Parallel>(entry); }

extern "C" void smidgen_fork(int threads, void (*run)(void*), void* data) {
    if (runtime_parallel) {
        runtime_parallel(run, data, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(run, data);
    run(data);
    for (auto& other : others) other.join();
}

PUBLIC int smidgen_has(const char* isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(isa, "avx2")) return avx2;
    if (!strcmp(isa, "avx512")) return avx512;
#if defined(SMIDGEN_WITH_AVX512_BF16)
    if (!strcmp(isa, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#elif defined(__aarch64__)
    if (!strcmp(isa, "neon")) return 1;
#endif
    return !strcmp(isa, "generic");
}
