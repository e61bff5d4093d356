// What the hardware gives: the only file that names an intrinsic or an instruction.
//
// The tests replace this file by one with the same functions for the host, so that every kernel
// also runs, thread by thread, where there is no GPU.

#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

// Blocks that share a row through a thread-block cluster; 1 where the device has none.
#ifndef CLUSTER
#define CLUSTER 1
#endif

#define DEVICE __device__ __forceinline__
// What is called once a row, and must not share registers with what goes on around it.
#define OUTLINED __device__ __noinline__

// The entry of a kernel: THREADS threads a block, of which the registers must leave room for
// BLOCKS blocks a multiprocessor.
#if CLUSTER > 1
#define KERNEL(threads, blocks) \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(threads, blocks)
#else
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#endif

// The argument of a kernel that functions get the address of.
#define ARGUMENT const __grid_constant__

// 16 bytes, as they are loaded and stored at once.
struct alignas(16) Bytes16 {
    uint32 word[4];
};

// --- where a thread is ----------------------------------------------------------------------

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int64 block_index() { return blockIdx.x; }
DEVICE int64 block_count() { return gridDim.x; }

// --- threads together -----------------------------------------------------------------------

DEVICE void block_barrier() { __syncthreads(); }

DEVICE void warp_barrier() { __syncwarp(); }

DEVICE bool warp_any(bool condition) { return __any_sync(0xffffffffu, condition); }

// The value of the lane whose number differs from this one's by `mask`, in binary.
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE double shuffle_xor(double value, int mask)
{
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE int64 shuffle_xor(int64 value, int mask)
{
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

#if CLUSTER > 1
DEVICE int cluster_rank()
{
    uint32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// All threads of the cluster arrive; what they wrote to shared memory before is seen after.
DEVICE void cluster_barrier()
{
    __syncwarp();  // .aligned: a warp arrives as one
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where block `rank` of the cluster has what lies at `here` in this block's shared memory.
template <class T>
DEVICE const T* in_block(const T* here, int rank)
{
    uint64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(rank));
    return reinterpret_cast<const T*>(there);
}
#else
DEVICE int cluster_rank() { return 0; }
DEVICE void cluster_barrier() { __syncthreads(); }
template <class T>
DEVICE const T* in_block(const T* here, int rank)
{
    return here;
}
#endif

// --- memory ---------------------------------------------------------------------------------

// The block's shared memory, whose size the launch decides: kernels use no other.
DEVICE Bytes16* dynamic_shared()
{
    extern __shared__ Bytes16 klfast_shared[];
    return klfast_shared;
}

// Loads from arrays that nobody writes meanwhile. `load_once` is for data that is read once or
// kept by the reader, `load_again` for data that will be asked for again soon.
DEVICE Bytes16 load_once(const Bytes16* at)
{
    Bytes16 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
                 : "l"(at));
    return value;
}
DEVICE Bytes16 load_again(const Bytes16* at)
{
    const uint4 value = __ldg(reinterpret_cast<const uint4*>(at));
    return {value.x, value.y, value.z, value.w};
}
// From shared memory: at once, which is not left to the compiler's discretion.
DEVICE Bytes16 load_shared(const Bytes16* at)
{
    const uint4 value = *reinterpret_cast<const uint4*>(at);
    return {value.x, value.y, value.z, value.w};
}
template <class T>
DEVICE T load_one(const T* at)
{
    return __ldg(at);
}

// 16 bytes from memory that nobody writes meanwhile to shared memory, on their own: a thread finds
// what it has asked for once it has waited until at most `BEHIND` of its batches are under way.
DEVICE void copy_async(Bytes16* to, const char* from)
{
    const uint32 shared = static_cast<uint32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
DEVICE void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int BEHIND>
DEVICE void await_batches()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(BEHIND) : "memory");
}

// Adds to a counter in global memory that every block adds to; returns what was there.
DEVICE uint32 atomic_add(uint32* at, uint32 value) { return atomicAdd(at, value); }

// What this thread wrote to global memory is seen by all before what it writes after.
DEVICE void memory_fence() { __threadfence(); }

// --- arithmetic -----------------------------------------------------------------------------

// 2**z: 0 far below, +inf far above, NaN at NaN; relative error about 2**-22.5.
DEVICE float exp2_approx(float z)
{
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(z));
    return value;
}
DEVICE float reciprocal_approx(float z)
{
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(z));
    return value;
}
// The larger or smaller of two numbers; of a number and NaN, the number.
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller(float a, float b) { return fminf(a, b); }
DEVICE double larger(double a, double b) { return fmax(a, b); }
DEVICE double smaller(double a, double b) { return fmin(a, b); }
// The same, but NaN where either is.
DEVICE float larger_or_nan(float a, float b)
{
    float value;
    asm("max.ftz.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
}
DEVICE float fma32(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE double fma64(double a, double b, double c) { return __fma_rn(a, b, c); }
DEVICE float sign_of(float size, float sign) { return copysignf(size, sign); }
// As IEEE 754 has it, never contracted with a neighbour.
DEVICE float add_exact(float a, float b) { return __fadd_rn(a, b); }
DEVICE double add_exact(double a, double b) { return __dadd_rn(a, b); }
DEVICE double multiply_exact(double a, double b) { return __dmul_rn(a, b); }

DEVICE float as_float(uint32 bits) { return __uint_as_float(bits); }
DEVICE uint32 as_bits(float value) { return __float_as_uint(value); }
DEVICE double as_double(uint64 bits) { return __longlong_as_double(static_cast<int64>(bits)); }
DEVICE uint64 as_bits(double value) { return static_cast<uint64>(__double_as_longlong(value)); }

// float16 and bfloat16 from their bits, and the two that a word holds, low half first.
DEVICE float half_to_float(uint16 bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
DEVICE float bfloat_to_float(uint16 bits) { return as_float(static_cast<uint32>(bits) << 16); }
DEVICE float bfloat_low(uint32 word) { return as_float(word << 16); }
DEVICE float bfloat_high(uint32 word) { return as_float(word & 0xffff0000u); }
DEVICE float half_low(uint32 word) { return half_to_float(static_cast<uint16>(word)); }
DEVICE float half_high(uint32 word) { return half_to_float(static_cast<uint16>(word >> 16)); }

// To the nearest, ties to even, rounded once.
DEVICE uint16 half_of(float value)
{
    uint16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
// Two of them in a word, low half first.
DEVICE uint32 halves_of(float low, float high)
{
    uint32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
DEVICE uint32 bfloats_of(float low, float high)
{
    uint32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
// Between float32 and float64, numbers below the normal range of float32 included: -ftz=true makes
// those 0 in the conversions of the language.
DEVICE double double_of(float value)
{
    double wide;
    asm("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(value));
    return wide;
}
DEVICE float float_of(double value)
{
    float nearest;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(nearest) : "d"(value));
    return nearest;
}
// Towards zero, with the last bit set if anything was lost: rounding that again is exact.
DEVICE float round_to_odd(double value)
{
    float below;
    asm("cvt.rz.f32.f64 %0, %1;" : "=f"(below) : "d"(value));
    return double_of(below) != value && value == value ? as_float(as_bits(below) | 1u) : below;
}
