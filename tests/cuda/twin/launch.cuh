// What runs a kernel on the host; follows its source. TWIN_KERNEL is its name.

namespace twin {

template <class CALL>
struct Body {
    static inline void (*kernel)(CALL);
    static inline const CALL* call;
    static void run() { kernel(*call); }
};

template <class CALL>
inline void set_body(void (*kernel)(CALL), const void* call)
{
    Body<CALL>::kernel = kernel;
    Body<CALL>::call = static_cast<const CALL*>(call);
    body = Body<CALL>::run;
}

inline void on_bad_address(int, siginfo_t* information, void*)
{
    if (!current) {
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    fail("illegal address %p", information->si_addr);
}

// Run the blocks of one cluster, from number `first` on, to their end.
inline void run_cluster(int64 first, char* stacks)
{
    const int warps_in_block = threads / 32;
    cluster = {"cluster", CLUSTER * threads, 0, {}, nullptr, nullptr};
    static Fiber* order[CLUSTER * 1024];
    for (int b = 0; b < CLUSTER; ++b) {
        char* guarded = shared_memory + b * (shared_size + 2 * GUARD);
        fill_guard(guarded, GUARD);
        memset(guarded + GUARD, 0xff, shared_size);
        fill_guard(guarded + GUARD + shared_size, GUARD);
        blocks[b] = {{"block", threads, 0, {}, nullptr, nullptr}, first + b, threads,
                     guarded + GUARD};
        for (int w = 0; w < warps_in_block; ++w)
            warps[b * warps_in_block + w].group = {"warp", 32, 0, {}, nullptr, nullptr};
        for (int t = 0; t < threads; ++t) {
            const int number = b * threads + t;
            Fiber& fiber = fibers[number];
            prepare(fiber.context, stacks + number * STACK);
            fiber.block = &blocks[b];
            fiber.warp = &warps[number / 32];
            fiber.waits = nullptr;
            fiber.thread = t;
            fiber.turn = 0;
            fiber.finished = false;
            order[number] = &fiber;
        }
    }
    if (random_state)
        shuffle(order, CLUSTER * threads);
    ready_first = nullptr;
    for (int i = 0; i < CLUSTER * threads; ++i)
        append(ready_first, ready_last, order[i]);
    current = ready_first;
    ready_first = current->next;
    change(outside, current->context);
    current = nullptr;
}

}  // namespace twin

// Bytes of stacks that a launch of so many threads a block needs.
extern "C" __attribute__((visibility("default"))) size_t twin_stacks(int threads)
{
    return CLUSTER * threads * twin::STACK;
}

// 0, or 1 with what went wrong in `message`. Not to be called twice at a time.
extern "C" __attribute__((visibility("default"))) int twin_launch(
    int64 grid, int threads, int64 shared, const void* call, uint64 seed, char* stacks,
    char* message, size_t message_size)
{
    using namespace twin;
    twin::message = message;
    twin::message_size = message_size;
    twin::grid = grid;
    twin::threads = threads;
    current = nullptr;
    shared_size = (shared + 15) / 16 * 16;
    random_state = seed * 0x9e3779b97f4a7c15ull;
    set_body(::TWIN_KERNEL, call);
    warps = static_cast<Warp*>(calloc(CLUSTER * threads / 32 + 1, sizeof(Warp)));
    fibers = static_cast<Fiber*>(calloc(CLUSTER * threads, sizeof(Fiber)));
    shared_memory = static_cast<char*>(
        aligned_alloc(1024, (CLUSTER * (shared_size + 2 * GUARD) + 1023) / 1024 * 1024));
    int64* order = static_cast<int64*>(malloc(grid / CLUSTER * sizeof(int64) + 1));
    static char signal_stack[64 * 1024];
    stack_t before_stack, on_stack = {};
    on_stack.ss_sp = signal_stack;
    on_stack.ss_size = sizeof signal_stack;
    struct sigaction before_segv, before_bus, action = {};
    action.sa_sigaction = on_bad_address;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaltstack(&on_stack, &before_stack);
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);

    volatile int status = 1;
    if (!sigsetjmp(failed, 1)) {
        if (threads < 1 || threads > 1024 || threads % 32 || threads > most_threads)
            fail("%d threads a block; the kernel takes multiples of 32 up to %d", threads,
                 most_threads);
        if (grid < 1 || grid % CLUSTER)
            fail("%lld blocks, not a positive multiple of the cluster's %d", grid, CLUSTER);
        for (int64 i = 0; i < grid / CLUSTER; ++i)
            order[i] = i * CLUSTER;
        if (random_state)
            shuffle(order, grid / CLUSTER);
        for (int64 i = 0; i < grid / CLUSTER; ++i)
            run_cluster(order[i], stacks);
        status = 0;
    }
    current = nullptr;
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    sigaltstack(&before_stack, nullptr);
    free(order);
    free(shared_memory);
    free(fibers);
    free(warps);
    return status;
}
