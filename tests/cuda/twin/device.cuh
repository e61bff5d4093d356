// The functions of kernels/cuda/device.cuh for the host: blocks and threads run for real.
//
// Every thread of a block, or of all blocks of a cluster, is a fiber with a stack of its own. A
// fiber runs until it waits at a barrier that others have yet to reach. One that never opens ends
// the launch with an error, as does what a device would leave undefined: different barriers for
// threads that must meet at one, misaligned loads, addresses outside of memory, writes beyond the
// dynamic shared memory, shared memory of a block that has ended.
//
// Arithmetic is the device's, with these differences. Approximations have about the error that the
// device documents, not the same bits. `a * b + c` is never contracted. float32 numbers below the
// normal range become 0 as with -ftz=true in the functions of this file, but not in the operators
// of the language: a processor's mode for that would take float64 with it, which CUDA never does.

#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

#ifndef CLUSTER
#define CLUSTER 1
#endif

#define DEVICE inline
#define OUTLINED inline
#define ARGUMENT const
#define KERNEL(threads, blocks)                  \
    namespace twin {                             \
    constexpr int most_threads = threads;        \
    }                                            \
    extern "C" void

struct alignas(16) Bytes16 {
    uint32 word[4];
};

namespace twin {

// --- contexts: a stack and where it goes on --------------------------------------------------

constexpr size_t STACK = 64 * 1024 + 320;  // no power of two, or all stacks share cache sets

[[noreturn]] void run_fiber();

#if defined(__linux__) && defined(__x86_64__)
using Context = void*;
extern "C" __attribute__((visibility("hidden"))) void twin_change(Context* from, Context to);
asm(".text\n.globl twin_change\n.hidden twin_change\n.type twin_change, @function\n"
    "twin_change:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size twin_change, .-twin_change\n");
inline void prepare(Context& context, char* stack)
{
    void** top = reinterpret_cast<void**>(stack + STACK) - 8;
    memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(run_fiber);
    context = top;
}
inline void change(Context& from, Context& to) { twin_change(&from, to); }
#elif defined(__linux__) && defined(__aarch64__)
using Context = void*;
extern "C" __attribute__((visibility("hidden"))) void twin_change(Context* from, Context to);
asm(".text\n.globl twin_change\n.hidden twin_change\n.type twin_change, %function\n"
    "twin_change:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
    "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\n"
    "stp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
    "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
    "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n"
    ".size twin_change, .-twin_change\n");
inline void prepare(Context& context, char* stack)
{
    void** top = reinterpret_cast<void**>(stack + STACK) - 20;
    memset(top, 0, 20 * sizeof(void*));
    top[11] = reinterpret_cast<void*>(run_fiber);
    context = top;
}
inline void change(Context& from, Context& to) { twin_change(&from, to); }
#else
#include <ucontext.h>
using Context = ucontext_t;
inline void prepare(Context& context, char* stack)
{
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
}
inline void change(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// --- blocks, warps, threads ------------------------------------------------------------------

struct Fiber;

struct Place {
    const char* file;
    int line;

    bool operator==(const Place& other) const
    {
        return line == other.line && (file == other.file || !strcmp(file, other.file));
    }
};

// Threads that wait for each other.
struct Group {
    const char* name;
    int size, arrived;
    Place place;
    Fiber *first, *last;
};

struct Warp {
    Group group;
    uint64 slot[2][32];  // what the lanes show each other, now and the time before
};

struct Block {
    Group group;
    int64 index;
    int running;   // threads that have not finished
    char* shared;  // between two guards
};

// 16 bytes on their way to shared memory.
struct Copy {
    Bytes16* to;
    Bytes16 value;
    int batch;
};
constexpr int MOST_COPIES = 64;

struct Fiber {
    Context context;
    Fiber* next;
    Block* block;
    Warp* warp;
    Group* waits;  // null: runs, is ready or has finished
    Place place;
    int thread;
    int turn;
    bool finished;
    int batch, copying;  // batches that have been ended; copies under way
    Copy copies[MOST_COPIES];
};

constexpr size_t GUARD = 4096;
constexpr uint16 GUARD_BITS = 0xffe5;  // in pairs, and in fours, a NaN

static Fiber* current;
static Fiber *ready_first, *ready_last;
static Context outside;
static sigjmp_buf failed;
static char* message;
static size_t message_size;

static int64 grid;
static int threads;
static size_t shared_size;
static Group cluster;
static Block blocks[CLUSTER];
static Warp* warps;
static Fiber* fibers;
static char* shared_memory;
static uint64 random_state;  // 0: everything in ascending order
static void (*body)();

[[noreturn]] inline void fail(const char* format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(message, message_size, format, arguments);
    va_end(arguments);
    if (current && length >= 0 && length < static_cast<int>(message_size))
        snprintf(message + length, message_size - length, " (thread %d of block %lld)",
                 current->thread, current->block->index);
    siglongjmp(failed, 1);
}

inline uint64 random_below(uint64 bound)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % bound;
}

template <class T>
inline void shuffle(T* items, int64 count)
{
    for (int64 i = count - 1; i > 0; --i) {
        const int64 other = static_cast<int64>(random_below(i + 1));
        const T item = items[i];
        items[i] = items[other];
        items[other] = item;
    }
}

inline void append(Fiber*& first, Fiber*& last, Fiber* fiber)
{
    fiber->next = nullptr;
    (first ? last->next : first) = fiber;
    last = fiber;
}

[[noreturn]] inline void fail_deadlock()
{
    current = nullptr;
    const Fiber *waiting = nullptr, *other = nullptr, *finished = nullptr;
    for (int i = 0; i < CLUSTER * threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.finished)
            finished = finished ? finished : &fiber;
        else if (!waiting)
            waiting = &fiber;
        else if (!other && fiber.waits != waiting->waits)
            other = &fiber;
    }
    if (finished)
        fail("deadlock: thread %d of block %lld waits for its %s at %s:%d, and thread %d of block "
             "%lld has finished",
             waiting->thread, waiting->block->index, waiting->waits->name, waiting->place.file,
             waiting->place.line, finished->thread, finished->block->index);
    fail("deadlock: thread %d of block %lld waits for its %s at %s:%d, and thread %d of block %lld "
         "for its %s at %s:%d",
         waiting->thread, waiting->block->index, waiting->waits->name, waiting->place.file,
         waiting->place.line, other->thread, other->block->index, other->waits->name,
         other->place.file, other->place.line);
}

// Run another thread until someone makes this one ready and its turn comes.
inline void yield()
{
    Fiber* from = current;
    current = ready_first;
    if (!current)
        fail_deadlock();
    ready_first = current->next;
    change(from->context, current->context);
}

inline void release(Group& group)
{
    if (random_state) {
        static Fiber* order[CLUSTER * 1024];
        int count = 0;
        for (Fiber* fiber = group.first; fiber; fiber = fiber->next)
            order[count++] = fiber;
        shuffle(order, count);
        group.first = nullptr;
        for (int i = 0; i < count; ++i)
            append(group.first, group.last, order[i]);
    }
    for (Fiber* fiber = group.first; fiber; fiber = fiber->next)
        fiber->waits = nullptr;
    if (group.first) {
        (ready_first ? ready_last->next : ready_first) = group.first;
        ready_last = group.last;
    }
    group.first = nullptr;
    group.arrived = 0;
}

inline void wait(Group& group, Place place)
{
    if (group.arrived && !(group.place == place))
        fail("threads of a %s meet at different barriers: %s:%d and %s:%d", group.name,
             group.place.file, group.place.line, place.file, place.line);
    group.place = place;
    if (++group.arrived == group.size) {
        release(group);
        return;
    }
    current->waits = &group;
    current->place = place;
    append(group.first, group.last, current);
    yield();
}

inline void fill_guard(char* at, size_t size)
{
    for (size_t i = 0; i < size / 2; ++i)
        reinterpret_cast<uint16*>(at)[i] = GUARD_BITS;
}

inline void check_guard(const char* at, size_t size, const char* side)
{
    for (size_t i = 0; i < size / 2; ++i) {
        if (reinterpret_cast<const uint16*>(at)[i] != GUARD_BITS)
            fail("block %lld wrote %s its %zu bytes of dynamic shared memory",
                 blocks[0].index + (at - shared_memory) / static_cast<int64>(shared_size + 2 * GUARD),
                 side, shared_size);
    }
}

[[noreturn]] inline void run_fiber()
{
    body();
    if (current->copying)
        fail("thread %d ends with %d copies under way", current->thread, current->copying);
    current->finished = true;
    Block& block = *current->block;
    if (--block.running == 0) {
        check_guard(block.shared - GUARD, GUARD, "before");
        check_guard(block.shared + shared_size, GUARD, "beyond");
        fill_guard(block.shared, shared_size);  // others that still read there get NaN
    }
    int running = 0;
    for (const Block& each : blocks)
        running += each.running;
    if (!running)
        change(current->context, outside);
    yield();
    abort();
}

// Lanes show each other a value; none writes where another still reads, two exchanges later.
template <class T>
inline const uint64* exchange(T value, Place place)
{
    Warp& warp = *current->warp;
    uint64* slot = warp.slot[current->turn ^= 1];
    memcpy(&slot[current->thread % 32], &value, sizeof value);
    wait(warp.group, place);
    return slot;
}

template <class T>
inline T shuffle_xor(T value, int mask, Place place)
{
    if (mask < 0 || mask > 31)
        fail("shuffle_xor with mask %d at %s:%d", mask, place.file, place.line);
    memcpy(&value, &exchange(value, place)[current->thread % 32 ^ mask], sizeof value);
    return value;
}

template <class T>
inline void check_load(const T* at, size_t alignment)
{
    const char* address = reinterpret_cast<const char*>(at);
    if (reinterpret_cast<size_t>(address) % alignment)
        fail("misaligned load of %zu bytes", alignment);
    if (address >= shared_memory && address < shared_memory + CLUSTER * (shared_size + 2 * GUARD))
        fail("a load for global memory from shared memory");
}

inline float flush(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value; }

// A float32 number that is as far from `value` as an approximation of the device may be. Errors are
// scattered: up to one unit in the last place on either side, or exact where the device is. Those of
// the device are a function of the digits, so that they may all have one sign in the sums of a row:
// TWIN_BIAS(m), where it is defined, is the relative error of a number whose digits are m, 1 <= m < 2.
inline float approximately(double value)
{
#ifdef TWIN_BIAS
    int exponent;
    const double m = 2.0 * frexp(value, &exponent);
    return flush(static_cast<float>(value == 1.0 ? value : value * (1.0 + (TWIN_BIAS(m)))));
#else
    const float nearest = flush(static_cast<float>(value));
    if (!(fabsf(nearest) > 0x1p-126f) || isinf(nearest))
        return nearest;
    uint32 bits;
    memcpy(&bits, &nearest, sizeof bits);
    if (bits & 0x7fffff)  // powers of two are exact
        bits += (bits * 2654435761u >> 16) % 3 - 1;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
#endif
}

}  // namespace twin

#define TWIN_PLACE                                                      \
    const char *file = __builtin_FILE(), int line = __builtin_LINE()

// --- where a thread is -----------------------------------------------------------------------

DEVICE int thread_index() { return twin::current->thread; }
DEVICE int64 block_index() { return twin::current->block->index; }
DEVICE int64 block_count() { return twin::grid; }

// --- threads together ------------------------------------------------------------------------

DEVICE void block_barrier(TWIN_PLACE) { twin::wait(twin::current->block->group, {file, line}); }
DEVICE void warp_barrier(TWIN_PLACE) { twin::wait(twin::current->warp->group, {file, line}); }
DEVICE bool warp_any(bool condition, TWIN_PLACE)
{
    const uint64* slot = twin::exchange<uint64>(condition, {file, line});
    uint64 any = 0;
    for (int lane = 0; lane < 32; ++lane)
        any |= slot[lane];
    return any != 0;
}

DEVICE float shuffle_xor(float value, int mask, TWIN_PLACE)
{
    return twin::shuffle_xor(value, mask, {file, line});
}
DEVICE double shuffle_xor(double value, int mask, TWIN_PLACE)
{
    return twin::shuffle_xor(value, mask, {file, line});
}
DEVICE int shuffle_xor(int value, int mask, TWIN_PLACE)
{
    return twin::shuffle_xor(value, mask, {file, line});
}
DEVICE int64 shuffle_xor(int64 value, int mask, TWIN_PLACE)
{
    return twin::shuffle_xor(value, mask, {file, line});
}

DEVICE int cluster_rank() { return static_cast<int>(block_index() % CLUSTER); }
DEVICE void cluster_barrier(TWIN_PLACE)
{
    twin::wait(CLUSTER > 1 ? twin::cluster : twin::current->block->group, {file, line});
}
template <class T>
DEVICE const T* in_block(const T* here, int rank)
{
    const char* shared = twin::current->block->shared;
    const int64 offset = reinterpret_cast<const char*>(here) - shared;
    if (offset < 0 || offset + sizeof(T) > twin::shared_size)
        twin::fail("in_block of what is not in shared memory");
    if (rank < 0 || rank >= CLUSTER)
        twin::fail("in_block(.., %d) in a cluster of %d", rank, CLUSTER);
    if (!twin::blocks[rank].running)
        twin::fail("in_block of a block that has ended");
    return reinterpret_cast<const T*>(twin::blocks[rank].shared + offset);
}

// --- memory ----------------------------------------------------------------------------------

DEVICE Bytes16* dynamic_shared()
{
    return reinterpret_cast<Bytes16*>(twin::current->block->shared);
}
DEVICE Bytes16 load_once(const Bytes16* at)
{
    twin::check_load(at, 16);
    return *at;
}
DEVICE Bytes16 load_again(const Bytes16* at) { return load_once(at); }
template <class T>
DEVICE T load_one(const T* at)
{
    twin::check_load(at, sizeof(T));
    return *at;
}
DEVICE Bytes16 load_shared(const Bytes16* at)
{
    const char* address = reinterpret_cast<const char*>(at);
    const char* shared = twin::current->block->shared;
    if (reinterpret_cast<size_t>(at) % 16)
        twin::fail("misaligned load of 16 bytes");
    if (address < shared || address + 16 > shared + twin::shared_size)
        twin::fail("a load for shared memory from elsewhere");
    return *at;
}
// As late as can be: until it is waited for, the place holds what spoils every result.
DEVICE void copy_async(Bytes16* to, const char* from)
{
    twin::Fiber& fiber = *twin::current;
    load_shared(to);
    if (fiber.copying == twin::MOST_COPIES)
        twin::fail("more than %d copies under way", twin::MOST_COPIES);
    const Bytes16 value = load_once(reinterpret_cast<const Bytes16*>(from));
    fiber.copies[fiber.copying++] = {to, value, fiber.batch};
    twin::fill_guard(reinterpret_cast<char*>(to), 16);
}
DEVICE void end_batch() { ++twin::current->batch; }
template <int BEHIND>
DEVICE void await_batches()
{
    twin::Fiber& fiber = *twin::current;
    int left = 0;
    for (int i = 0; i < fiber.copying; ++i) {
        if (fiber.copies[i].batch < fiber.batch - BEHIND)
            *fiber.copies[i].to = fiber.copies[i].value;
        else
            fiber.copies[left++] = fiber.copies[i];
    }
    fiber.copying = left;
}
DEVICE uint32 atomic_add(uint32* at, uint32 value)
{
    const uint32 before = *at;
    *at += value;
    return before;
}
DEVICE void memory_fence() { asm volatile("" ::: "memory"); }

// --- arithmetic ------------------------------------------------------------------------------

namespace twin {
template <class TO, class FROM>
inline TO same_bits(FROM value)
{
    static_assert(sizeof(TO) == sizeof(FROM), "as many bits");
    TO result;
    memcpy(&result, &value, sizeof result);
    return result;
}
}  // namespace twin

DEVICE float exp2_approx(float z)
{
    return twin::approximately(exp2(static_cast<double>(twin::flush(z))));
}
DEVICE float reciprocal_approx(float z) { return twin::approximately(1.0 / twin::flush(z)); }
DEVICE float larger(float a, float b) { return fmaxf(twin::flush(a), twin::flush(b)); }
DEVICE float smaller(float a, float b) { return fminf(twin::flush(a), twin::flush(b)); }
DEVICE double larger(double a, double b) { return fmax(a, b); }
DEVICE double smaller(double a, double b) { return fmin(a, b); }
DEVICE float larger_or_nan(float a, float b)
{
    return a != a || b != b ? twin::same_bits<float>(0x7fffffffu) : larger(a, b);
}
DEVICE float fma32(float a, float b, float c)
{
    return twin::flush(__builtin_fmaf(twin::flush(a), twin::flush(b), twin::flush(c)));
}
DEVICE double fma64(double a, double b, double c) { return __builtin_fma(a, b, c); }
DEVICE float sign_of(float size, float sign) { return copysignf(size, sign); }
DEVICE float add_exact(float a, float b)
{
    return twin::flush(twin::flush(a) + twin::flush(b));
}
DEVICE double add_exact(double a, double b) { return a + b; }
DEVICE double multiply_exact(double a, double b) { return a * b; }

DEVICE float as_float(uint32 bits) { return twin::same_bits<float>(bits); }
DEVICE uint32 as_bits(float value) { return twin::same_bits<uint32>(value); }
DEVICE double as_double(uint64 bits) { return twin::same_bits<double>(bits); }
DEVICE uint64 as_bits(double value) { return twin::same_bits<uint64>(value); }

DEVICE float half_to_float(uint16 bits)
{
    const uint32 sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00)  // infinity and NaN
        return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13 | (rest > 0x7c00) << 22);
    // As the exponent of float32 sees it the number is 2**112 times too small: exact.
    return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
}
DEVICE float bfloat_to_float(uint16 bits) { return as_float(static_cast<uint32>(bits) << 16); }
DEVICE float bfloat_low(uint32 word) { return as_float(word << 16); }
DEVICE float bfloat_high(uint32 word) { return as_float(word & 0xffff0000u); }
DEVICE float half_low(uint32 word) { return half_to_float(static_cast<uint16>(word)); }
DEVICE float half_high(uint32 word) { return half_to_float(static_cast<uint16>(word >> 16)); }

DEVICE uint16 half_of(float value)
{
    const uint32 bits = as_bits(value), size = bits & 0x7fffffffu;
    const uint16 sign = static_cast<uint16>(bits >> 16 & 0x8000u);
    if (size > 0x7f800000u)
        return 0x7fff;  // NaN as the device writes it
    if (size >= 0x477ff000u)  // half a unit above the largest, which rounds up
        return sign | 0x7c00u;
    if (size < 0x38800000u)  // below the normal range: the sum's last bit is worth 2**-24
        return sign | static_cast<uint16>(as_bits(as_float(size) + 0.5f) - as_bits(0.5f));
    return sign | static_cast<uint16>((size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13);
}
DEVICE double double_of(float value) { return value; }
DEVICE float float_of(double value) { return static_cast<float>(value); }
DEVICE uint32 halves_of(float low, float high)
{
    return half_of(low) | static_cast<uint32>(half_of(high)) << 16;
}
DEVICE uint32 bfloats_of(float low, float high)
{
    uint32 word = 0;
    const float both[2] = {low, high};
    for (int i = 0; i < 2; ++i) {
        const uint32 bits = as_bits(both[i]);
        const uint32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        word |= (both[i] == both[i] ? rounded : 0x7fffu) << 16 * i;
    }
    return word;
}
DEVICE float round_to_odd(double value)
{
    float below = static_cast<float>(value);
    if (fabs(double_of(below)) > fabs(value))
        below = as_float(as_bits(below) - 1u);
    return double_of(below) != value && value == value ? as_float(as_bits(below) | 1u) : below;
}
