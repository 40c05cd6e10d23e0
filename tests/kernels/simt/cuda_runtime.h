// CUDA's execution model on one host thread: every device thread is a fiber that runs until its next barrier, in an
// order that a seed shuffles, one warp a block staying behind as far as the barriers let it. What is computed between
// barriers is computed for real, so a missing or divergent barrier shows as a wrong result or as a deadlock.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __host__
using std::max;
using std::min;

namespace simt {

struct Index { int x; };
struct Barrier { int expected, arrived = 0, generation = 0; };
struct Warp { Barrier barrier{32}; uint64_t slots[32]; };
struct Block { Barrier barrier; std::vector<Warp> warps; };
struct Fiber {
    Index thread, block;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

inline Index grid_size;
inline Fiber* current;
inline ucontext_t scheduler;
inline long idle;
inline Barrier grid_barrier;
inline std::vector<Block> blocks;
inline std::function<void()> body;

inline void wait(Barrier& barrier) {
    const int generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        idle = 0;
        return;
    }
    while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
}

inline Warp& warp() { return blocks[current->block.x].warps[current->thread.x / 32]; }

template <typename T>
T exchange(T value, int from) {
    Warp& w = warp();
    std::memcpy(&w.slots[current->thread.x % 32], &value, sizeof value);
    wait(w.barrier);
    T other;
    std::memcpy(&other, &w.slots[from], sizeof other);
    wait(w.barrier);
    return other;
}

inline void start() {
    body();
    current->done = true;
    idle = 0;
    swapcontext(&current->context, &scheduler);
}

inline void run(int block_count, int threads, unsigned seed, std::function<void()> function) {
    std::mt19937 random(seed);
    body = std::move(function);
    grid_size.x = block_count;
    grid_barrier = {block_count * threads};
    blocks.assign(block_count, Block{{threads}, std::vector<Warp>(threads / 32)});
    std::vector<Fiber> fibers(block_count * threads);
    for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        fiber.block.x = int(i) / threads;
        fiber.thread.x = int(i) % threads;
        fiber.stack.reset(new char[1 << 16]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = 1 << 16;
        makecontext(&fiber.context, start, 0);
    }
    std::vector<Fiber*> order;
    for (Fiber& fiber : fibers) order.push_back(&fiber);
    std::shuffle(order.begin(), order.end(), random);
    for (idle = 0; !order.empty();) {
        for (Fiber* fiber : order) {
            const bool behind = fiber->thread.x / 32 == int(seed) % (threads / 32);
            if (behind && idle == 0) continue;
            current = fiber;
            swapcontext(&scheduler, &fiber->context);
        }
        order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
        if (++idle > 4 && !order.empty()) {
            std::fprintf(stderr, "deadlock: the threads wait at different barriers\n");
            std::abort();
        }
    }
}

}  // namespace simt

#define threadIdx (simt::current->thread)
#define blockIdx (simt::current->block)
#define gridDim (simt::grid_size)

inline void __syncthreads() { simt::wait(simt::blocks[blockIdx.x].barrier); }
inline void __syncwarp() { simt::wait(simt::warp().barrier); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) { return simt::exchange(x, (threadIdx.x % 32) ^ mask); }
template <typename T>
T __shfl_up_sync(unsigned, T x, int by) { return simt::exchange(x, std::max(threadIdx.x % 32 - by, threadIdx.x % 32 < by ? threadIdx.x % 32 : 0)); }
inline unsigned __ballot_sync(unsigned, bool bit) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= unsigned(simt::exchange(int(bit), lane)) << lane;
    return all;
}
inline bool __any_sync(unsigned mask, bool bit) { return __ballot_sync(mask, bit) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <typename T>
T atomicAdd(T* p, T x) { const T old = *p; *p += x; return old; }
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
T __ldcg(const T* p) { return *p; }
inline void __stcs(float* p, float x) { *p = x; }
using std::isfinite;
