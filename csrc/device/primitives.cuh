// All that the kernels use of a GPU (sm_80 and up). tests/simulator/primitives.cuh supplies the same on a CPU.
//
// Shared memory is addressed in bytes from shared_base(), global memory by pointers; both only through these functions.
// load_matrices<N> and mma_k16 / mma_k8 are ldmatrix and mma.sync with PTX's fragment layouts: in an 8x8 matrix of
// 16-bit elements lane l holds row l / 4, columns 2 (l % 4) and + 1; lane 8 i + r gives the address of row r of matrix i.
#pragma once

#include "elements.cuh"

#define KERNEL(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS, BLOCKS)
#define DEVICE __device__ __forceinline__

DEVICE int thread_x() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int grid_x() { return gridDim.x; }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// The compiler moves no load of shared memory from behind this to before it. For sm_100 and later it otherwise begins a
// long sum with all of its loads, for which there are not the registers.
DEVICE void hold_loads() { __syncwarp(); }

// The same value, of which the compiler does not know that: what is made of it is made again, and not kept in registers.
DEVICE int forget(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

DEVICE int count_bits(unsigned bits) { return __popc(bits); }

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

DEVICE unsigned shared_base() { return static_cast<unsigned>(__cvta_generic_to_shared(dynamic_shared_memory)); }

template <class V>
DEVICE V load_shared(unsigned address) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "words, pairs or fours");
    union {
        V value;
        unsigned word[sizeof(V) / 4];
    } u;
    if constexpr (sizeof(V) == 4) {
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(u.word[0]) : "r"(address) : "memory");
    } else if constexpr (sizeof(V) == 8) {
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(u.word[0]), "=r"(u.word[1]) : "r"(address) : "memory");
    } else {
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(u.word[0]), "=r"(u.word[1]), "=r"(u.word[2]), "=r"(u.word[3])
                     : "r"(address)
                     : "memory");
    }
    return u.value;
}

template <class V>
DEVICE void store_shared(unsigned address, V value) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "words, pairs or fours");
    union {
        V value;
        unsigned word[sizeof(V) / 4];
    } u;
    u.value = value;
    if constexpr (sizeof(V) == 4) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(u.word[0]) : "memory");
    } else if constexpr (sizeof(V) == 8) {
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(u.word[0]), "r"(u.word[1]) : "memory");
    } else {
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(u.word[0]), "r"(u.word[1]),
                     "r"(u.word[2]), "r"(u.word[3])
                     : "memory");
    }
}

template <class V>
DEVICE V load_global(const V* pointer) {
    return *pointer;
}

template <class V>
DEVICE void store_global(V* pointer, V value) {
    *pointer = value;
}

// Sixteen bytes from global to shared memory, or zeros; they are there for this thread after wait_copies.
DEVICE void copy_async(unsigned address, const void* pointer, unsigned valid) {
    asm volatile("{.reg .pred p;\n .reg .b32 bytes;\n setp.ne.b32 p, %2, 0;\n selp.b32 bytes, 16, 0, p;\n"
                 " cp.async.cg.shared.global [%0], [%1], 16, bytes;}" ::"r"(address),
                 "l"(__cvta_generic_to_global(pointer)), "r"(valid)
                 : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last GROUPS committed groups of this thread are on their way.
template <int GROUPS>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

template <int N>
DEVICE void load_matrices(unsigned (&r)[N], unsigned address) {
    static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
    if constexpr (N == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
    } else if constexpr (N == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    }
}

// The same with every matrix transposed: lane l holds rows 2 (l % 4) and + 1 of column l / 4.
template <int N>
DEVICE void load_matrices_transposed(unsigned (&r)[N], unsigned address) {
    static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
    if constexpr (N == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(address)
                     : "memory");
    } else if constexpr (N == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    }
}

template <class T>
struct IsBFloat16 {
    static constexpr bool value = false;
};
template <>
struct IsBFloat16<BFloat16> {
    static constexpr bool value = true;
};

// c (16x8) += a (16x16) b (16x8), float32 sums.
template <class T>
DEVICE void mma_k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if constexpr (IsBFloat16<T>::value) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// c (16x8) += a (16x8) b (8x8).
template <class T>
DEVICE void mma_k8(float (&c)[4], const unsigned (&a)[2], const unsigned (&b)[1]) {
    if constexpr (IsBFloat16<T>::value) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    } else {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    }
}

// Two floats rounded to nearest even, the first in the lower half.
template <class T>
DEVICE unsigned narrow(float low, float high) {
    unsigned pair;
    if constexpr (IsBFloat16<T>::value) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

// The same of max(x, 0); NaN stays NaN.
template <class T>
DEVICE unsigned narrow_relu(float low, float high) {
    unsigned pair;
    if constexpr (IsBFloat16<T>::value) {
        asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

template <class T>
DEVICE Floats2 widen(unsigned pair) {
    Floats2 wide;
    if constexpr (IsBFloat16<T>::value) {
        wide.x = __uint_as_float(pair << 16);
        wide.y = __uint_as_float(pair & 0xffff0000u);
    } else {
        asm("{.reg .f16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;}"
            : "=f"(wide.x), "=f"(wide.y)
            : "r"(pair));
    }
    return wide;
}

DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
