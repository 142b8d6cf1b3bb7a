// Threads of a simulated block as fibers, each on a stack of its own, and the scheduler that runs them one after the
// other; what they say when they do what a GPU does not forgive. Part of simulate.cpp. Needs nothing but the C library,
// whose few functions are declared here.
#pragma once
#include "device.h"

extern "C" {
void* mmap(void*, unsigned long, int, int, int, long);
void* malloc(unsigned long);
void free(void*);
int memcmp(const void*, const void*, unsigned long);
void* memcpy(void*, const void*, unsigned long);
long read(int, void*, unsigned long);
long write(int, const void*, unsigned long);
int dprintf(int, const char*, ...);
int vdprintf(int, const char*, __builtin_va_list);
int vsnprintf(char*, unsigned long, const char*, __builtin_va_list);
void _exit(int) __attribute__((noreturn));
}

hq_thread hq_now;

#if __has_feature(address_sanitizer)
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, unsigned long size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, unsigned long* size);
void __sanitizer_set_death_callback(void (*)());
void* __asan_get_report_address();
int __asan_report_present();
}
#else
static void __sanitizer_start_switch_fiber(void**, const void*, unsigned long) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, unsigned long*) {}
static void __sanitizer_set_death_callback(void (*)()) {}
static void* __asan_get_report_address() { return nullptr; }
static int __asan_report_present() { return 0; }
#endif

// hq_switch(save, to): leaves this stack, its pointer in *save, for another. What callees keep lies on the stacks. It
// ends with a jump on x86-64: processors predict that a return goes to its call, which is elsewhere.
#if defined(__x86_64__)
asm(R"(.text
.type hq_switch, @function
hq_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    pop %rcx
    jmp *%rcx
)");
constexpr int kReturn = 6, kFrame = 8;  // words: where the address lies, and the frame, which leaves the stack aligned
#elif defined(__aarch64__)
asm(R"(.text
.type hq_switch, %function
hq_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr int kReturn = 11, kFrame = 20;
#else
#error "fibers need a stack switch for this machine: add it beside the others"
#endif
extern "C" void hq_switch(void** save, void* to);

constexpr int kMaxThreads = 1024, kMaxParams = 32, kMaxFloats = 4, kTeam = 32, kMaxCopies = 32;
constexpr unsigned long kStack = 256 << 10;

enum State { kReady, kBarrier, kTogether, kEnded };

struct Site {
    const char* file;
    int line;
    void* address;
    bool operator==(const Site& o) const { return address == o.address; }
};

struct Copy {
    void* to;
    const void* from;
    int size, bytes;
};

struct Fiber {
    void* stack;  // null before it has run and after it has ended
    void* top;
    void* fake_stack;  // of AddressSanitizer
    int x, y;
    State state;
    Site site;  // where it waits
    int value, mask;
    int* c;
    float* c_f16;
    const uint32_t *a, *b;
    uint32_t* loaded;
    const uint8_t* matrix_row;
    Copy copies[kMaxCopies];  // under way
    int ncopies;
};

struct Array {
    uint8_t *base, *data, *original;
    uint64_t bytes;
};

// Those who wait for each other: the threads of a block, or the lanes of a team.
struct Meeting {
    int waiting, first;  // how many, and who was first
};

static Fiber fibers[kMaxThreads];
static Meeting of_block, of_team[kMaxThreads / kTeam], of_wave[kMaxThreads / 64];
static void* stacks[kMaxThreads];  // those that no fiber has, from nstacks - 1 down: the last one used is in the caches
static int nstacks;
static struct {
    void (*run)();
    uint32_t grid[3], block[3];
    uint64_t params[kMaxParams];  // whole numbers and pointers, and apart from them the floats, as they are passed
    double floats[kMaxFloats];
    Array arrays[kMaxParams];
    int threads, nparams, now, ended;
    void* top;  // the scheduler's stack
    void* fake_stack;
    const void* bottom;
    unsigned long size;
    void* home;  // the stack of who called hq_launch
    char* said;  // where a fault is told; null: stderr, and the process ends
    unsigned long said_size;
} launch;

// Faults

static void say(const char* format, ...) {
    __builtin_va_list args;
    __builtin_va_start(args, format);
    if (!launch.said) vdprintf(2, format, args);
    else if (const int n = vsnprintf(launch.said, launch.said_size, format, args); n > 0) {
        const unsigned long used = (unsigned long)n < launch.said_size ? (unsigned long)n : launch.said_size - 1;
        launch.said += used, launch.said_size -= used;
    }
    __builtin_va_end(args);
}
[[noreturn]] static void go_home() {
    void* nobody;
    hq_switch(&nobody, launch.home);
    __builtin_unreachable();
}
[[noreturn]] static void give_up() {
    if (!launch.said) _exit(3);
    go_home();  // the fibers stay where they are: the next launch has others
}

static void where() {
    const hq_thread& t = hq_now;
    say("hipquant: block (%u, %u), thread (%d, %d): ", t.block_x, t.block_y, t.x, t.y);
}

void hq_fault(const char* format, ...) {
    char sentence[256];
    __builtin_va_list args;
    __builtin_va_start(args, format);
    vsnprintf(sentence, sizeof sentence, format, args);
    __builtin_va_end(args);
    where();
    say("%s\n", sentence);
    give_up();
}

static void describe(int thread) {
    const Fiber& f = fibers[thread];
    if (f.state == kEnded) return say("  thread %d has ended\n", thread);
    const char* what = f.state == kBarrier ? "barrier" : f.state == kTogether ? "shuffle" : "start";
    say("  thread %d waits at the %s in %s:%d @%p\n", thread, what, f.site.file, f.site.line, f.site.address);
}
[[noreturn]] static void differ(const char* what, int one, int other) {
    say("hipquant: block (%u, %u): %s\n", hq_now.block_x, hq_now.block_y, what);
    describe(one);
    describe(other);
    give_up();
}

// AddressSanitizer and UBSan have written their report: which kernel, and which of its arrays is nearest.
static void on_death() {
    where();
    if (!__asan_report_present()) return say("the report above\n");
    const int64_t at = (int64_t)__asan_get_report_address();
    int64_t nearest = 1 << 16;
    int which = -1;
    for (int i = 0; i < launch.nparams; i++) {
        const int64_t begin = (int64_t)launch.arrays[i].data, end = begin + (int64_t)launch.arrays[i].bytes;
        const int64_t distance = !begin ? nearest : at < begin ? begin - at : at - end;
        if (distance < nearest) nearest = distance, which = i;
    }
    if (which < 0) return say("not at one of its parameters\n");
    const Array& a = launch.arrays[which];
    const bool before = at < (int64_t)a.data;
    say("byte %lld %s parameter %d of %llu bytes\n", (long long)(before ? (int64_t)a.data - at : nearest),
        before ? "before" : "behind the end of", which, (unsigned long long)a.bytes);
}

// Fibers

__attribute__((no_sanitize("address"))) static void to_scheduler(bool ended) {
    Fiber& f = fibers[launch.now];
    __sanitizer_start_switch_fiber(ended ? nullptr : &f.fake_stack, launch.bottom, launch.size);
    hq_switch(&f.top, launch.top);
    __sanitizer_finish_switch_fiber(f.fake_stack, &launch.bottom, &launch.size);
}

// Whole numbers and pointers have registers, then places on the stack, in their order; floats have others.
__attribute__((no_sanitize("address"))) static void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &launch.bottom, &launch.size);
    const uint64_t* p = launch.params;
    const double* f = launch.floats;
    using W = uint64_t;
    using Run = void (*)(W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W,
                         double, double, double, double);
    static_assert(kMaxParams == 32 && kMaxFloats == 4, "as many as are passed");
    ((Run)launch.run)(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14],
                      p[15], p[16], p[17], p[18], p[19], p[20], p[21], p[22], p[23], p[24], p[25], p[26], p[27], p[28],
                      p[29], p[30], p[31], f[0], f[1], f[2], f[3]);
    fibers[launch.now].state = kEnded;
    to_scheduler(true);
}

// What hq_switch goes to: a stack, by its end, on which `begin` is about to run.
__attribute__((no_sanitize("address"))) static void* new_stack_top(void* end, void (*begin)()) {
    void** frame = (void**)end - kFrame;
    for (int i = 0; i < kFrame; i++) frame[i] = nullptr;
    frame[kReturn] = (void*)begin;
    return frame;
}
static void* new_stack() {
    void* stack = mmap(nullptr, kStack, 3, 0x4022, -1, 0);  // read and write; private, anonymous, no reserve
    if (stack == (void*)-1) hq_fault("no memory for the stack of a thread");
    return stack;
}

static void resume(int thread) {
    Fiber& f = fibers[thread];
    if (!f.stack) {
        f.stack = nstacks ? stacks[--nstacks] : new_stack();
        f.top = new_stack_top((char*)f.stack + kStack, fiber_main), f.fake_stack = nullptr;
    }
    launch.now = thread, hq_now.x = f.x, hq_now.y = f.y;
    __sanitizer_start_switch_fiber(&launch.fake_stack, f.stack, kStack);
    hq_switch(&launch.top, f.top);
    __sanitizer_finish_switch_fiber(launch.fake_stack, nullptr, nullptr);
    if (f.state != kEnded) return;
    stacks[nstacks++] = f.stack, f.stack = nullptr;
    launch.ended++;
}

// Lets others run until the threads [first, last) have come here too: true in the last one, which acts for all.
static bool gather(State state, Meeting& meeting, int first, int last, const Site& site, const char* differently) {
    const int me = launch.now;
    Fiber& f = fibers[me];
    f.state = state, f.site = site;
    if (!meeting.waiting) meeting.first = me;
    else if (!(fibers[meeting.first].site == site)) differ(differently, meeting.first, me);
    if (++meeting.waiting < last - first) return to_scheduler(false), false;
    meeting.waiting = 0;
    for (int i = first; i < last; i++) fibers[i].state = kReady;
    return true;
}

void hq_barrier(const char* file, int line) {
    const Site site{file, line, __builtin_return_address(0)};
    gather(kBarrier, of_block, 0, launch.threads, site, "threads of a block wait at different barriers");
}

// Where a team, or both teams of a wave of 64, meet.
static Meeting& meeting_of(int first, int lanes) { return lanes == kTeam ? of_team[first / kTeam] : of_wave[first / 64]; }

// The lanes that do something together, which must all exist.
static int first_lane(int lanes) {
    const int first = launch.now / lanes * lanes;
    if (first + lanes > launch.threads)
        hq_fault("a shuffle over %d lanes reads lane %d, which does not exist: "
                 "the block has %d threads and runs on waves of %d",
                 lanes, launch.threads - first, launch.threads, hq_now.wave);
    return first;
}

// None can go on.
[[noreturn]] static void deadlock() {
    int waiting = -1, out = -1;
    for (int i = 0; i < launch.threads; i++) {
        if (fibers[i].state == kEnded) out = i;
        if (fibers[i].state == kTogether || (fibers[i].state == kBarrier && waiting < 0)) waiting = i;
    }
    for (int i = 0; i < launch.threads && out < 0; i++)
        if (fibers[i].state != fibers[waiting].state) out = i;
    differ("threads wait for others that do not come", waiting, out < 0 ? waiting : out);
}

// Between two barriers threads run one after the other: upwards on waves of 32, downwards on waves of 64, so that what
// misses a barrier reads too early in one of them.
static void run_block() {
    const bool upwards = hq_now.wave == 32;
    const int n = launch.threads;
    for (int i = 0; i < n; i++) fibers[i].state = kReady, fibers[i].ncopies = 0;
    for (launch.ended = 0; launch.ended < n;) {
        bool moved = false;
        for (int i = 0; i < n; i++) {
            const int t = upwards ? i : n - 1 - i;
            if (fibers[t].state == kReady) resume(t), moved = true;
        }
        if (!moved) deadlock();
    }
}
