// The primitives of csrc/device/primitives.cuh on a CPU. engine.cpp has what they do and what it checks.
#pragma once

#include "elements.cuh"

#define KERNEL(THREADS, BLOCKS) void
#define DEVICE inline

namespace simulator {

int thread_x();
int block_x();
int block_y();
int grid_x();
void sync_block();
void sync_warp();
float shuffle_xor(float value, int mask);
void shared_read(unsigned address, void* value, unsigned bytes);
void shared_write(unsigned address, const void* value, unsigned bytes);
void global_read(const void* pointer, void* value, unsigned bytes);
void global_write(void* pointer, const void* value, unsigned bytes);
void copy_async(unsigned address, const void* pointer, bool valid);
void commit_copies();
void wait_copies(unsigned groups);
void load_matrices(unsigned* registers, unsigned address, int count, bool transposed);
void mma(float* c, const unsigned* a, const unsigned* b, int depth, bool bfloat16);
unsigned narrow(float low, float high, bool bfloat16);
void widen(unsigned pair, float* low, float* high, bool bfloat16);
float sigmoid(float x);

template <class T>
struct IsBFloat16 {
    static constexpr bool value = false;
};
template <>
struct IsBFloat16<BFloat16> {
    static constexpr bool value = true;
};

}  // namespace simulator

DEVICE int thread_x() { return simulator::thread_x(); }
DEVICE int block_x() { return simulator::block_x(); }
DEVICE int block_y() { return simulator::block_y(); }
DEVICE int grid_x() { return simulator::grid_x(); }
DEVICE void sync_block() { simulator::sync_block(); }
DEVICE void sync_warp() { simulator::sync_warp(); }
DEVICE void hold_loads() {}  // of no consequence for what is computed, and no barrier to rely on
DEVICE int forget(int value) { return value; }
DEVICE int count_bits(unsigned bits) { return __builtin_popcount(bits); }
DEVICE float shuffle_xor(float value, int mask) { return simulator::shuffle_xor(value, mask); }
DEVICE unsigned shared_base() { return 0; }

template <class V>
DEVICE V load_shared(unsigned address) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "words, pairs or fours");
    V value;
    simulator::shared_read(address, &value, sizeof(V));
    return value;
}

template <class V>
DEVICE void store_shared(unsigned address, V value) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "words, pairs or fours");
    simulator::shared_write(address, &value, sizeof(V));
}

template <class V>
DEVICE V load_global(const V* pointer) {
    V value;
    simulator::global_read(pointer, &value, sizeof(V));
    return value;
}

template <class V>
DEVICE void store_global(V* pointer, V value) {
    simulator::global_write(pointer, &value, sizeof(V));
}

DEVICE void copy_async(unsigned address, const void* pointer, bool valid) {
    simulator::copy_async(address, pointer, valid);
}

DEVICE void commit_copies() { simulator::commit_copies(); }

template <int GROUPS>
DEVICE void wait_copies() {
    simulator::wait_copies(GROUPS);
}

template <int N>
DEVICE void load_matrices(unsigned (&r)[N], unsigned address) {
    static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
    simulator::load_matrices(r, address, N, false);
}

template <int N>
DEVICE void load_matrices_transposed(unsigned (&r)[N], unsigned address) {
    static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
    simulator::load_matrices(r, address, N, true);
}

template <class T>
DEVICE void mma_k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    simulator::mma(c, a, b, 16, simulator::IsBFloat16<T>::value);
}

template <class T>
DEVICE void mma_k8(float (&c)[4], const unsigned (&a)[2], const unsigned (&b)[1]) {
    simulator::mma(c, a, b, 8, simulator::IsBFloat16<T>::value);
}

template <class T>
DEVICE unsigned narrow(float low, float high) {
    return simulator::narrow(low, high, simulator::IsBFloat16<T>::value);
}

template <class T>
DEVICE unsigned narrow_relu(float low, float high) {
    return narrow<T>(low < 0.0f ? 0.0f : low, high < 0.0f ? 0.0f : high);
}

template <class T>
DEVICE Floats2 widen(unsigned pair) {
    Floats2 wide;
    simulator::widen(pair, &wide.x, &wide.y, simulator::IsBFloat16<T>::value);
    return wide;
}

DEVICE float sigmoid(float x) { return simulator::sigmoid(x); }
