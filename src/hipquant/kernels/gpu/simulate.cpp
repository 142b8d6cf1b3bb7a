// Runs simulated kernels: reads launches, runs each block's threads as fibers, writes the arrays back. One program for
// all kernels of its sources, started by toolchain/simulate.py; it ends at the first fault, with a sentence on stderr.
// Needs nothing but the C library, whose few functions are declared here.
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
void _exit(int) __attribute__((noreturn));

// The kernels of the sources and the end of what is in shared memory: generated, and linked last.
struct hq_kernel {
    const char* name;
    void (*run)();
};
extern const hq_kernel hq_kernels[];
extern char hq_shared_end[];
}
HQ_SHARED char shared_begin[8] = {1};  // linked first
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

// hq_switch(save, to): leaves this stack, its pointer in *save, for another. What callees keep lies on the stacks.
#if defined(__x86_64__)
asm(R"(.text
.type hq_switch, @function
hq_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
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

constexpr int kMaxThreads = 1024, kMaxParams = 8, kTeam = 32, kMaxCopies = 32;
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
    void* stack;
    void* top;
    void* fake_stack;  // of AddressSanitizer
    State state;
    Site site;  // where it waits
    int value, mask;
    int* c;
    const uint32_t *a, *b;
    Copy copies[kMaxCopies];  // under way
    int ncopies;
};

struct Array {
    uint8_t *base, *data, *original;
    uint64_t bytes;
};

static Fiber fibers[kMaxThreads];
static struct {
    void (*run)();
    uint32_t block[3];
    uint64_t params[kMaxParams];
    Array arrays[kMaxParams];
    int threads, nparams, now;
    void* top;  // the scheduler's stack
    void* fake_stack;
    const void* bottom;
    unsigned long size;
} launch;

// Faults

static void where() {
    const hq_thread& t = hq_now;
    dprintf(2, "hipquant: block (%u, %u), thread (%d, %d): ", t.block_x, t.block_y, t.x, t.y);
}

void hq_fault(const char* format, ...) {
    __builtin_va_list args;
    __builtin_va_start(args, format);
    where();
    vdprintf(2, format, args);
    dprintf(2, "\n");
    _exit(3);
}

static void describe(int thread) {
    const Fiber& f = fibers[thread];
    if (f.state == kEnded) return (void)dprintf(2, "  thread %d has ended\n", thread);
    const char* what = f.state == kBarrier ? "barrier" : f.state == kTogether ? "shuffle" : "start";
    dprintf(2, "  thread %d waits at the %s in %s:%d @%p\n", thread, what, f.site.file, f.site.line, f.site.address);
}
[[noreturn]] static void differ(const char* what, int one, int other) {
    dprintf(2, "hipquant: block (%u, %u): %s\n", hq_now.block_x, hq_now.block_y, what);
    describe(one);
    describe(other);
    _exit(3);
}

// AddressSanitizer and UBSan have written their report: which kernel, and which of its arrays is nearest.
static void on_death() {
    where();
    if (!__asan_report_present()) return (void)dprintf(2, "the report above\n");
    const int64_t at = (int64_t)__asan_get_report_address();
    int64_t nearest = 1 << 16;
    int which = -1;
    for (int i = 0; i < launch.nparams; i++) {
        const int64_t begin = (int64_t)launch.arrays[i].data, end = begin + (int64_t)launch.arrays[i].bytes;
        const int64_t distance = !begin ? nearest : at < begin ? begin - at : at - end;
        if (distance < nearest) nearest = distance, which = i;
    }
    if (which < 0) return (void)dprintf(2, "not at one of its parameters\n");
    const Array& a = launch.arrays[which];
    const bool before = at < (int64_t)a.data;
    dprintf(2, "byte %lld %s parameter %d of %llu bytes\n", (long long)(before ? (int64_t)a.data - at : nearest),
            before ? "before" : "behind the end of", which, (unsigned long long)a.bytes);
}

// Fibers

__attribute__((no_sanitize("address"))) static void to_scheduler(bool ended) {
    Fiber& f = fibers[launch.now];
    __sanitizer_start_switch_fiber(ended ? nullptr : &f.fake_stack, launch.bottom, launch.size);
    hq_switch(&f.top, launch.top);
    __sanitizer_finish_switch_fiber(f.fake_stack, &launch.bottom, &launch.size);
}

__attribute__((no_sanitize("address"))) static void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &launch.bottom, &launch.size);
    const uint64_t* p = launch.params;
    using Run = void (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
    ((Run)launch.run)(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]);  // whole numbers and pointers: in registers
    fibers[launch.now].state = kEnded;
    to_scheduler(true);
}

__attribute__((no_sanitize("address"))) static void start(Fiber& f) {
    if (!f.stack) f.stack = mmap(nullptr, kStack, 3, 0x4022, -1, 0);  // read and write; private, anonymous, no reserve
    if (f.stack == (void*)-1) hq_fault("no memory for the stack of a thread");
    void** frame = (void**)((uint64_t)f.stack + kStack) - kFrame;
    for (int i = 0; i < kFrame; i++) frame[i] = nullptr;
    frame[kReturn] = (void*)fiber_main;
    f.top = frame, f.state = kReady, f.fake_stack = nullptr, f.ncopies = 0;
}

static void resume(int thread) {
    launch.now = thread;
    hq_now.x = thread % (int)launch.block[0], hq_now.y = thread / (int)launch.block[0];
    __sanitizer_start_switch_fiber(&launch.fake_stack, fibers[thread].stack, kStack);
    hq_switch(&launch.top, fibers[thread].top);
    __sanitizer_finish_switch_fiber(launch.fake_stack, nullptr, nullptr);
}

// Lets others run until the threads [first, last) have come here too: true in the last one, which acts for all.
static bool gather(State state, int first, int last, const Site& site, const char* differently) {
    const int me = launch.now;
    Fiber& f = fibers[me];
    f.state = state, f.site = site;
    int missing = 0;
    for (int i = first; i < last; i++) {
        if (fibers[i].state != state) missing++;
        else if (!(fibers[i].site == site)) differ(differently, i, me);
    }
    if (missing) return to_scheduler(false), false;
    for (int i = first; i < last; i++) fibers[i].state = kReady;
    return true;
}

void hq_barrier(const char* file, int line) {
    const Site site{file, line, __builtin_return_address(0)};
    gather(kBarrier, 0, launch.threads, site, "threads of a block wait at different barriers");
}

// The lanes that do something together, which must all exist.
static int first_lane(int lanes) {
    const int first = launch.now / lanes * lanes;
    if (first + lanes > launch.threads)
        hq_fault("a shuffle over %d lanes reads lane %d, which does not exist: "
                 "the block has %d threads and runs on waves of %d",
                 lanes, launch.threads - first, launch.threads, hq_now.wave);
    return first;
}

int hq_shuffle_xor(int v, int mask, int lanes, const char* file, int line) {
    const Site site{file, line, __builtin_return_address(0)};
    const int first = first_lane(lanes), me = launch.now;
    if (mask < 0 || mask >= lanes) hq_fault("a shuffle with mask %d among %d lanes", mask, lanes);
    fibers[me].value = v, fibers[me].mask = mask;
    if (gather(kTogether, first, first + lanes, site, "lanes of a team meet at different shuffles")) {
        int values[64];
        for (int i = 0; i < lanes; i++) values[i] = fibers[first + i].value;
        for (int i = 0; i < lanes; i++) fibers[first + i].value = values[i ^ fibers[first + i].mask];
    }
    return fibers[me].value;
}

// c (16 x 8) += a (16 x k) * b (k x 8), spread over the lanes as device.h says.
static void multiply(Fiber* team, int k) {
    int8_t a[16][32], b[8][32];
    for (int l = 0; l < kTeam; l++)
        for (int part = 0; part < k / 16; part++)
            for (int i = 0; i < 4; i++) {
                const int at = 16 * part + l % 4 * 4 + i;
                for (int h = 0; h < 2; h++) a[l / 4 + 8 * h][at] = (int8_t)(team[l].a[2 * part + h] >> 8 * i);
                b[l / 4][at] = (int8_t)(team[l].b[part] >> 8 * i);
            }
    for (int l = 0; l < kTeam; l++)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < k; j++) team[l].c[i] += a[l / 4 + i / 2 * 8][j] * b[l % 4 * 2 + i % 2][j];
}

void hq_mma(int* c, const uint32_t* a, const uint32_t* b, int k, const char* file, int line) {
    const Site site{file, line, __builtin_return_address(0)};
    const int first = first_lane(kTeam);
    Fiber& f = fibers[launch.now];
    f.c = c, f.a = a, f.b = b;
    if (gather(kTogether, first, first + kTeam, site, "lanes of a team meet at different matrix products"))
        multiply(fibers + first, k);
}

// Copies may be done at once or when they are waited for: on waves of 64 they are done early, on waves of 32 late.
static void carry_out(const Copy& c) {
    memcpy(c.to, c.from, (uint64_t)c.bytes);
    for (int i = c.bytes; i < c.size; i++) ((uint8_t*)c.to)[i] = 0;
}
void hq_copy_async(void* to, const void* from, int size, int bytes) {
    const Copy copy{to, from, size, bytes};
    if (bytes < 0 || bytes > size) hq_fault("a copy of %d of %d bytes", bytes, size);
    if (hq_now.wave == 64) return carry_out(copy);
    Fiber& f = fibers[launch.now];
    if (f.ncopies == kMaxCopies) hq_fault("more than %d copies under way", kMaxCopies);
    f.copies[f.ncopies++] = copy;
}
void hq_wait_copies() {
    Fiber& f = fibers[launch.now];
    for (int i = 0; i < f.ncopies; i++) carry_out(f.copies[i]);
    f.ncopies = 0;
}

// Shared memory holds what earlier blocks left there, so to speak: NaN as float and as half.
__attribute__((no_sanitize("address"))) static void poison_shared_memory() {
    const uint64_t end = (uint64_t)hq_shared_end;
    for (uint64_t p = (uint64_t)shared_begin; p < end; p++) *(volatile uint8_t*)p = p % 2 ? 0xFF : 0xCD;
}

// Between two barriers threads run one after the other: upwards on waves of 32, downwards on waves of 64, so that what
// misses a barrier reads too early in one of them.
static void run_block() {
    poison_shared_memory();
    for (int i = 0; i < launch.threads; i++) start(fibers[i]);
    for (int ended = 0; ended < launch.threads;) {
        bool moved = false;
        int waiting = -1, out = -1;
        ended = 0;
        for (int i = 0; i < launch.threads; i++) {
            const int t = hq_now.wave == 32 ? i : launch.threads - 1 - i;
            if (fibers[t].state == kReady) resume(t), moved = true;
        }
        for (int i = 0; i < launch.threads; i++) {
            moved |= fibers[i].state == kReady;
            ended += fibers[i].state == kEnded;
            if (fibers[i].state == kEnded) out = i;
            if (fibers[i].state == kTogether || (fibers[i].state == kBarrier && waiting < 0)) waiting = i;
        }
        if (moved || ended == launch.threads) continue;
        for (int i = 0; i < launch.threads && out < 0; i++)
            if (fibers[i].state != fibers[waiting].state) out = i;
        differ("threads wait for others that do not come", waiting, out < 0 ? waiting : out);
    }
}

// Launches

static bool take(int from, void* to, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes;) {
        const long n = read(from, (char*)to + at, bytes - at);
        if (n <= 0) return false;
        at += (uint64_t)n;
    }
    return true;
}
static void give(int to, const void* from, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes;) {
        const long n = write(to, (const char*)from + at, bytes - at);
        if (n <= 0) _exit(4);
        at += (uint64_t)n;
    }
}

// As simulate.py packs it; then each array's bytes.
struct Message {
    char name[128];
    uint32_t grid[3], block[3], nparams, zero;
    struct {
        uint64_t value;  // or the bytes of an array
        uint32_t kind;   // 0 a number, 1 an array that is read, 2 one that is written and goes back
        uint32_t offset;  // bytes beyond a multiple of 16 at which it lies
    } params[kMaxParams];
};

static void load(int in, const Message& m) {
    launch = {};
    for (const hq_kernel* k = hq_kernels; k->name; k++) {
        const char *a = k->name, *b = m.name;
        while (*a && *a == *b) a++, b++;
        if (*a == *b) launch.run = k->run;
    }
    if (!launch.run) hq_fault("there is no such kernel in these sources");
    for (int i = 0; i < 3; i++) launch.block[i] = m.block[i];
    launch.threads = (int)(m.block[0] * m.block[1] * m.block[2]);
    launch.nparams = (int)m.nparams;
    if (launch.threads < 1 || launch.threads > kMaxThreads || m.nparams > kMaxParams)
        hq_fault("%d threads, %d parameters", launch.threads, launch.nparams);
    for (int i = 0; i < launch.nparams; i++) {
        launch.params[i] = m.params[i].value;
        if (!m.params[i].kind) continue;
        Array& a = launch.arrays[i];
        a.bytes = m.params[i].value;
        a.base = (uint8_t*)malloc(a.bytes + m.params[i].offset), a.data = a.base + m.params[i].offset;
        if (!a.base || !take(in, a.data, a.bytes))
            hq_fault("parameter %d of %llu bytes did not arrive", i, (unsigned long long)a.bytes);
        if (m.params[i].kind == 1) a.original = (uint8_t*)malloc(a.bytes), memcpy(a.original, a.data, a.bytes);
        launch.params[i] = (uint64_t)a.data;
    }
}

static void finish(int out) {
    for (int i = 0; i < launch.nparams; i++) {
        const Array& a = launch.arrays[i];
        if (a.original && memcmp(a.original, a.data, a.bytes))
            hq_fault("it has written to parameter %d, which is an input", i);
    }
    const uint64_t done = 1;
    give(out, &done, sizeof done);
    for (int i = 0; i < launch.nparams; i++) {
        const Array& a = launch.arrays[i];
        if (a.base && !a.original) give(out, a.data, a.bytes);
        free(a.base), free(a.original);
    }
}

// Runs launches from one file to another until there are no more.
extern "C" __attribute__((visibility("default"))) int hq_simulate(int in, int out, int wave) {
    __sanitizer_set_death_callback(on_death);
    static Message m;
    while (take(in, &m, sizeof m)) {
        load(in, m);
        hq_now.wave = wave;
        for (uint32_t y = 0; y < m.grid[1]; y++)
            for (uint32_t x = 0; x < m.grid[0]; x++) hq_now.block_x = x, hq_now.block_y = y, run_block();
        finish(out);
    }
    return 0;
}

extern "C" int main(int, char** argv) { return hq_simulate(0, 1, argv[1][0] == '6' ? 64 : 32); }

// Half precision, rounded to nearest even, without the processor's help.

float hq_half_to_float(uint32_t bits) {
    const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3FF;
    if (exponent == 0) {
        const float v = (float)mantissa * 0x1p-24f;
        return sign ? -v : v;
    }
    return __builtin_bit_cast(float, sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13);
}

uint16_t hq_float_to_half(float v) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, v), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (size >> 13 & 0x3FF));  // NaN
    if (size >= 0x477FF000) return (uint16_t)(sign | 0x7C00);                        // from 65520 on: infinity
    if (size < 0x38800000) {  // below 2^-14: adding 2^-1 rounds to multiples of 2^-24
        const float sum = __builtin_bit_cast(float, size) + 0.5f;
        return (uint16_t)(sign | (__builtin_bit_cast(uint32_t, sum) - 0x3F000000));
    }
    return (uint16_t)(sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13));
}
