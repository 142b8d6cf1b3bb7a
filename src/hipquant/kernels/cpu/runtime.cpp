// The CPU's driver below Python: one pool of threads that runs lists of launches, and what the processor can do.
// Needs nothing but the C library, whose few functions are declared here; compiled for the baseline of the machine.
#include "launch.h"

extern "C" {
int pthread_create(unsigned long*, const void*, void* (*)(void*), void*);
int pthread_detach(unsigned long);
long syscall(long, ...);
int fork(void);
int waitpid(int, int*, int);
void _exit(int) __attribute__((noreturn));
void (*signal(int, void (*)(int)))(int);
int getpid(void);
int sched_getcpu(void);
int sched_getaffinity(int, size_t, uint64_t*);
int sched_setaffinity(int, size_t, const uint64_t*);
int* __errno_location(void);
}

#define HQ_EXPORT extern "C" __attribute__((visibility("default")))
using Entry = void (*)(const hq_launch*, void**);

constexpr int kMaxParams = 16;
constexpr uint32_t kMaxThreads = 256, kMaxNodes = 1 << 24;
constexpr int kCpuWords = 16;  // affinity masks of 1024 processors
constexpr int kInterrupted = 4, kArgumentListTooLong = 7;  // EINTR, E2BIG
constexpr int kChunks = 8;     // of a node for each thread: each costs 0.2 us, the last ones wait for each other
constexpr int kSpins = 4096;  // pauses before a waiting thread sleeps: 50 to 200 us

// One launch as Python packs it: hipquant/driver/cpu.py, Function.
struct Node {
    Entry entry;
    uint32_t grid[3], block[3];
    uint32_t shared_bytes, nparams;
    uint64_t params[kMaxParams];  // each in a slot of eight bytes
};
static_assert(sizeof(Node) == 8 + 24 + 8 + 8 * kMaxParams);

// A word that threads wait for, on a cache line of its own.
struct alignas(64) Word {
    uint32_t v;
};
// A list of nodes runs without a barrier of all threads: a node is cut into chunks, threads claim them, and whoever
// finishes the last one opens the next node. A thread that the system has put aside holds nobody up unless it has a
// chunk in hand.
struct Pool {
    Word lock;      // 0 free, 1 taken, 2 taken and waited for
    Word job;       // counts the lists run; idle workers wait for it to change
    Word phase;     // counts the nodes run; threads without a chunk wait for it to change
    Word done;      // chunks of the node that are finished
    Word sleepers;  // threads that sleep in the kernel rather than spin
    Word workers;   // threads running beside the caller
    alignas(64) uint64_t claim;  // node << 40 | its chunks << 20 | next chunk; no chunks: nothing to run
    const Node* nodes;
    uint32_t count, threads, stop;
    int cpu[kMaxThreads];  // where each thread was when it last began a list
};
static Pool pool;

template <class T> static T get(const T* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}
#if defined(__x86_64__)
constexpr long kFutex = 202;
#else
constexpr long kFutex = 98;
#endif
constexpr int kWaitPrivate = 128, kWakePrivate = 129;
static void wait_while(const uint32_t* word, uint32_t value) {
    for (int i = 0; i < kSpins; i++) {
        if (get(word) != value) return;
        pause();
    }
    __atomic_fetch_add(&pool.sleepers.v, 1, __ATOMIC_SEQ_CST);
    while (get(word) == value) syscall(kFutex, word, kWaitPrivate, value, nullptr, nullptr, 0);
    __atomic_fetch_sub(&pool.sleepers.v, 1, __ATOMIC_SEQ_CST);
}
static void wake(const uint32_t* word) {
    if (__atomic_load_n(&pool.sleepers.v, __ATOMIC_SEQ_CST)) syscall(kFutex, word, kWakePrivate, INT32_MAX, nullptr, nullptr, 0);
}

static uint64_t blocks_of(const Node& n) { return (uint64_t)n.grid[0] * n.grid[1] * n.grid[2]; }

static void run_blocks(const Node& n, uint32_t thread, uint64_t begin, uint64_t end) {
    hq_launch launch = {{n.grid[0], n.grid[1], n.grid[2]}, {n.block[0], n.block[1], n.block[2]}, n.shared_bytes, thread, begin, end};
    void* params[kMaxParams];
    for (uint32_t i = 0; i < n.nparams && i < kMaxParams; i++) params[i] = (void*)&n.params[i];
    n.entry(&launch, params);
}

static uint64_t chunk_size(const Node& n) {
    const uint64_t most = kChunks * pool.threads;
    return (blocks_of(n) + most - 1) / most;
}

// Opens the next node that has blocks, or ends the list.
static void open_node(uint64_t i) {
    while (i < pool.count && !blocks_of(pool.nodes[i])) i++;
    uint64_t chunks = 0;
    if (i < pool.count) {
        const uint64_t size = chunk_size(pool.nodes[i]);
        chunks = (blocks_of(pool.nodes[i]) + size - 1) / size;
    }
    pool.done.v = 0;
    __atomic_store_n(&pool.claim, i << 40 | chunks << 20, __ATOMIC_RELEASE);
    __atomic_fetch_add(&pool.phase.v, 1, __ATOMIC_SEQ_CST);
    wake(&pool.phase.v);
}

// A thread that wakes often finds itself on the processor of the one that woke it, and the two share it for 50 ms and
// more until the system moves one of them. So a later thread steps aside: it forbids itself the taken processors, which
// moves it at once, until it finds itself beside another one again.
static void step_aside(uint32_t thread) {
    const int cpu = pool.cpu[thread] = sched_getcpu();
    bool taken = false;
    for (uint32_t i = 0; i < thread; i++) taken |= pool.cpu[i] == cpu;
    uint64_t free[kCpuWords] = {}, any = 0;
    if (!taken || sched_getaffinity(getpid(), sizeof free, free) < 0) return;
    for (uint32_t i = 0; i < thread; i++)
        if (pool.cpu[i] >= 0 && pool.cpu[i] < 64 * kCpuWords) free[pool.cpu[i] / 64] &= ~(1ull << pool.cpu[i] % 64);
    for (uint64_t word : free) any |= word;
    if (!any || sched_setaffinity(0, sizeof free, free) < 0) return;
    pool.cpu[thread] = sched_getcpu();
}

// Runs chunks until the list has ended.
static void take_part(uint32_t thread) {
    for (;;) {
        const uint32_t phase = get(&pool.phase.v);
        const uint64_t claim = __atomic_fetch_add(&pool.claim, 1, __ATOMIC_ACQ_REL);
        const uint64_t chunks = claim >> 20 & 0xfffff, chunk = claim & 0xfffff;
        if (!chunks) return;
        if (chunk >= chunks) {
            wait_while(&pool.phase.v, phase);
            continue;
        }
        const Node& n = pool.nodes[claim >> 40];  // the list cannot end before this chunk does
        const uint64_t size = chunk_size(n), blocks = blocks_of(n), end = (chunk + 1) * size;
        run_blocks(n, thread, chunk * size, end < blocks ? end : blocks);
        if (__atomic_add_fetch(&pool.done.v, 1, __ATOMIC_ACQ_REL) == chunks) open_node((claim >> 40) + 1);
    }
}

static void* work(void* arg) {
    const uint32_t thread = (uint32_t)(uint64_t)arg;
    for (;;) {
        const uint32_t job = get(&pool.job.v);
        if (get(&pool.stop)) break;
        step_aside(thread);
        take_part(thread);
        wait_while(&pool.job.v, job);
    }
    if (__atomic_sub_fetch(&pool.workers.v, 1, __ATOMIC_SEQ_CST) == 0) wake(&pool.workers.v);
    return nullptr;
}

static void lock() {
    uint32_t free = 0;
    if (__atomic_compare_exchange_n(&pool.lock.v, &free, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return;
    while (__atomic_exchange_n(&pool.lock.v, 2, __ATOMIC_ACQUIRE)) syscall(kFutex, &pool.lock.v, kWaitPrivate, 2, nullptr, nullptr, 0);
}
static void unlock() {
    if (__atomic_exchange_n(&pool.lock.v, 0, __ATOMIC_RELEASE) == 2) syscall(kFutex, &pool.lock.v, kWakePrivate, 1, nullptr, nullptr, 0);
}

static void call_workers() {
    __atomic_fetch_add(&pool.job.v, 1, __ATOMIC_SEQ_CST);
    wake(&pool.job.v);
}

static void stop_workers() {
    __atomic_store_n(&pool.stop, 1, __ATOMIC_SEQ_CST);
    call_workers();
    while (const uint32_t n = get(&pool.workers.v)) wait_while(&pool.workers.v, n);
    pool.stop = 0;
}

// Threads that a list runs on, the caller's included. Returns what it was.
HQ_EXPORT uint32_t hq_set_threads(uint32_t threads) {
    lock();
    const uint32_t before = pool.threads;
    threads = threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads;
    if (threads != before) stop_workers();
    pool.threads = threads;
    unlock();
    return before;
}

// Runs nodes one after the other, each on all threads. Callers from several threads take turns. Returns 0, or the
// error number of the thread that could not be started; nothing has run then.
HQ_EXPORT int hq_run(const Node* nodes, uint32_t count) {
    if (count >= kMaxNodes) return kArgumentListTooLong;
    lock();
    int error = 0;
    const uint32_t threads = pool.threads ? pool.threads : 1;
    for (uint32_t i = pool.workers.v + 1; i < threads && !error; i++) {
        unsigned long id;
        error = pthread_create(&id, nullptr, work, (void*)(uint64_t)i);
        if (error) break;
        pthread_detach(id);
        __atomic_fetch_add(&pool.workers.v, 1, __ATOMIC_SEQ_CST);
    }
    if (!error) {
        if (threads == 1 || (count == 1 && blocks_of(nodes[0]) == 1)) {
            for (uint32_t i = 0; i < count; i++)
                if (const uint64_t blocks = blocks_of(nodes[i])) run_blocks(nodes[i], 0, 0, blocks);
        } else {
            pool.nodes = nodes;
            pool.count = count;
            pool.cpu[0] = sched_getcpu();
            open_node(0);
            call_workers();
            take_part(0);
        }
    } else {
        stop_workers();
    }
    unlock();
    return error;
}

// A child of fork has none of its parent's threads, whatever they were doing.
HQ_EXPORT void hq_after_fork() {
    const uint32_t threads = pool.threads;
    pool = {};
    pool.threads = threads;
}

// Runs a code object's `hq_probe` in a child process, so that an instruction that traps kills only the child: a
// hypervisor may advertise what it does not let run. 1: it ran and was right; 0: it was wrong; -n: signal n ended it;
// 2: there could be no child.
HQ_EXPORT int hq_try_probe(int (*probe)()) {
    const int child = fork();
    if (child < 0) return 2;
    if (child == 0) {
        for (int s = 1; s < 32; s++) signal(s, nullptr);  // the parent's handlers are not for this
        _exit(probe());
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0)
        if (*__errno_location() != kInterrupted) return 2;  // somebody else reaps this process's children
    return status & 127 ? -(status & 127) : status >> 8 & 255;
}
