// Runs simulated kernels, each block's threads as fibers: one program for all kernels of its sources. In a process of
// its own, started by toolchain/simulate.py, it reads launches and writes the arrays back (hq_simulate), and ends at
// the first fault with a sentence on stderr. As a library it runs them on the caller's memory (hq_launch) and gives the
// sentence back. Needs nothing but the C library, whose few functions are declared here.
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

int hq_shuffle_xor(int v, int mask, int lanes, const char* file, int line) {
    const Site site{file, line, __builtin_return_address(0)};
    const int first = first_lane(lanes), me = launch.now;
    if (mask < 0 || mask >= lanes) hq_fault("a shuffle with mask %d among %d lanes", mask, lanes);
    fibers[me].value = v, fibers[me].mask = mask;
    if (gather(kTogether, meeting_of(first, lanes), first, first + lanes, site,
               "lanes of a team meet at different shuffles")) {
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
    if (gather(kTogether, of_team[first / kTeam], first, first + kTeam, site,
               "lanes of a team meet at different matrix products"))
        multiply(fibers + first, k);
}

// The same of halves, with k = 16.
static void multiply_f16(Fiber* team) {
    float a[16][16], b[8][16];
    for (int l = 0; l < kTeam; l++)
        for (int i = 0; i < 4; i++) {
            const int part = i / 2, shift = i % 2 * 16, at = part * 8 + l % 4 * 2 + i % 2;
            for (int h = 0; h < 2; h++)
                a[l / 4 + 8 * h][at] = hq_half_to_float(team[l].a[part * 2 + h] >> shift & 0xFFFF);
            b[l / 4][at] = hq_half_to_float(team[l].b[part] >> shift & 0xFFFF);
        }
    for (int l = 0; l < kTeam; l++)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 16; j++) team[l].c_f16[i] += a[l / 4 + i / 2 * 8][j] * b[l % 4 * 2 + i % 2][j];
}

void hq_mma_f16(float* c, const uint32_t* a, const uint32_t* b, const char* file, int line) {
    const Site site{file, line, __builtin_return_address(0)};
    const int first = first_lane(kTeam);
    Fiber& f = fibers[launch.now];
    f.c_f16 = c, f.a = a, f.b = b;
    if (gather(kTogether, of_team[first / kTeam], first, first + kTeam, site,
               "lanes of a team meet at different matrix products"))
        multiply_f16(fibers + first);
}

// c (16 x 16) += a (16 x 16) * b (16 x 16) of halves by a wave, as the instructions spread them: of a lane, `depth` halves
// of row lane % 16 of a and of this column of b; where that is all 16, both halves of the wave must have the same.
static void multiply_tiles(Fiber* wave, int lanes, int depth) {
    float a[16][16], b[16][16];
    const int rows = 256 / lanes;
    for (int l = lanes - 1; l >= 0; l--)
        for (int i = 0; i < depth; i++) {
            const int k = l / 16 * depth % 16 + i, at = l % 16, shift = i % 2 * 16, twin = depth == 16 ? at : l;
            if (wave[l].a[i / 2] != wave[twin].a[i / 2] || wave[l].b[i / 2] != wave[twin].b[i / 2])
                hq_fault("lanes %d and %d have different operands of a matrix product", twin, l);
            a[at][k] = hq_half_to_float(wave[l].a[i / 2] >> shift & 0xFFFF);
            b[k][at] = hq_half_to_float(wave[l].b[i / 2] >> shift & 0xFFFF);
        }
    for (int l = 0; l < lanes; l++)
        for (int i = 0; i < rows; i++) {
            const int row = depth == 16 ? 2 * i + l / 16 : l / 16 * rows + i;
            for (int k = 0; k < 16; k++) wave[l].c_f16[i] += a[row][k] * b[k][l % 16];
        }
}

void hq_multiply_tiles(
    float* c, const uint32_t* a, const uint32_t* b, int lanes, int depth, const char* file, int line) {
    const Site site{file, line, __builtin_return_address(0)};
    if (lanes != hq_now.wave) hq_fault("a matrix product of %d lanes on waves of %d", lanes, hq_now.wave);
    const int first = first_lane(lanes);
    Fiber& f = fibers[launch.now];
    f.c_f16 = c, f.a = a, f.b = b;
    if (gather(kTogether, meeting_of(first, lanes), first, first + lanes, site,
               "lanes of a wave meet at different matrix products"))
        multiply_tiles(fibers + first, lanes, depth);
}

// Four matrices, whose rows' addresses the lanes have, spread over the lanes as device.h says.
static void spread_matrices(Fiber* team, bool transposed) {
    uint16_t rows[kTeam][8];
    for (int l = 0; l < kTeam; l++) memcpy(rows[l], team[l].matrix_row, sizeof rows[l]);
    for (int l = 0; l < kTeam; l++)
        for (int m = 0; m < 4; m++) {
            const int first = l % 4 * 2, at = l / 4;
            const uint32_t low = transposed ? rows[8 * m + first][at] : rows[8 * m + at][first];
            const uint32_t high = transposed ? rows[8 * m + first + 1][at] : rows[8 * m + at][first + 1];
            team[l].loaded[m] = low | high << 16;
        }
}

void hq_load_matrices(uint32_t* r, const void* row, bool transposed, const char* file, int line) {
    const Site site{file, line, __builtin_return_address(0)};
    const int first = first_lane(kTeam);
    Fiber& f = fibers[launch.now];
    f.loaded = r, f.matrix_row = (const uint8_t*)row;
    if (gather(kTogether, of_team[first / kTeam], first, first + kTeam, site,
               "lanes of a team meet at different loads of matrices"))
        spread_matrices(fibers + first, transposed);
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

// Shared memory holds what earlier blocks left there, so to speak: NaN as float and as half. All kernels' is much more
// than one writes to, so that in the caller's process, where speed matters, all of it is filled before the first block,
// and then what that one changed.
constexpr uint64_t kPoison = 0xFFCDFFCDFFCDFFCD, kPiece = 256;
static uint8_t* changed[4096];  // pieces of shared memory
static int nchanged;

__attribute__((no_sanitize("address"))) static void poison(uint8_t* begin, uint8_t* end) {
    for (; begin < end; begin += 8) *(volatile uint64_t*)begin = kPoison;
}
static uint8_t* shared_end() { return (uint8_t*)hq_shared_end; }
static void find_changed() {
    nchanged = 0;
    for (uint8_t* p = (uint8_t*)shared_begin; p < shared_end(); p += kPiece)
        for (uint64_t i = 0; i < kPiece && p + i < shared_end(); i += 8) {
            if (*(volatile uint64_t*)(p + i) == kPoison) continue;
            if (nchanged == (int)(sizeof changed / sizeof *changed)) hq_fault("too much shared memory is written to");
            changed[nchanged++] = p;
            break;
        }
}
static void poison_shared_memory(bool first) {
    if (first || !launch.said) return poison((uint8_t*)shared_begin, shared_end());
    for (int i = 0; i < nchanged; i++) {
        uint8_t* end = changed[i] + kPiece;
        poison(changed[i], end < shared_end() ? end : shared_end());
    }
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

// Launches

static void find(const char* name) {
    launch.run = nullptr;
    for (const hq_kernel* k = hq_kernels; k->name; k++) {
        const char *a = k->name, *b = name;
        while (*a && *a == *b) a++, b++;
        if (*a == *b) launch.run = k->run;
    }
}

static void run_grid() {
    for (int i = 0; i < launch.threads; i++)
        fibers[i].x = i % (int)launch.block[0], fibers[i].y = i / (int)launch.block[0];
    for (uint32_t y = 0; y < launch.grid[1]; y++)
        for (uint32_t x = 0; x < launch.grid[0]; x++) {
            const bool first = x == 0 && y == 0;
            hq_now.block_x = x, hq_now.block_y = y;
            poison_shared_memory(first);
            run_block();
            if (first && launch.said) find_changed();
        }
}

static void set_geometry(const uint32_t* grid, const uint32_t* block, int nparams) {
    for (int i = 0; i < 3; i++) launch.grid[i] = grid[i], launch.block[i] = block[i];
    const uint64_t threads = (uint64_t)block[0] * block[1];
    launch.threads = (int)threads, launch.nparams = nparams;
    if (threads < 1 || threads > kMaxThreads || block[2] != 1 || grid[2] != 1 || nparams < 0 || nparams > kMaxParams)
        hq_fault("%llu threads, %d parameters", (unsigned long long)threads, nparams);
}

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
        uint32_t kind;   // 0 a number, 1 an array that is read, 2 one that is written and goes back, 3 a float
        uint32_t offset;  // bytes beyond a multiple of 16 at which it lies
    } params[kMaxParams];
};

static void load(int in, const Message& m) {
    launch = {};
    find(m.name);
    if (!launch.run) hq_fault("there is no such kernel in these sources");
    set_geometry(m.grid, m.block, (int)m.nparams);
    int nwords = 0, nfloats = 0;
    for (int i = 0; i < launch.nparams; i++) {
        const uint64_t value = m.params[i].value;
        if (m.params[i].kind == 3 && nfloats == kMaxFloats) hq_fault("more than %d floats", kMaxFloats);
        if (m.params[i].kind == 3) launch.floats[nfloats++] = __builtin_bit_cast(double, value);
        if (m.params[i].kind == 0) launch.params[nwords++] = value;
        if (m.params[i].kind % 3 == 0) continue;
        Array& a = launch.arrays[i];
        a.bytes = value;
        a.base = (uint8_t*)malloc(a.bytes + m.params[i].offset), a.data = a.base + m.params[i].offset;
        if (!a.base || !take(in, a.data, a.bytes))
            hq_fault("parameter %d of %llu bytes did not arrive", i, (unsigned long long)a.bytes);
        if (m.params[i].kind == 1) a.original = (uint8_t*)malloc(a.bytes), memcpy(a.original, a.data, a.bytes);
        launch.params[nwords++] = (uint64_t)a.data;
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
        run_grid();
        finish(out);
    }
    return 0;
}

extern "C" int main(int, char** argv) { return hq_simulate(0, 1, argv[1][0] == '6' ? 64 : 32); }

// Whether there is a kernel of this name.
extern "C" __attribute__((visibility("default"))) int hq_has(const char* name) {
    find(name);
    return launch.run != nullptr;
}

static struct {
    const char* name;
    const uint32_t *grid, *block;
    const uint64_t* params;
    int nparams;
    uint32_t floats;
    bool done;
} call;
static void run_call() {
    find(call.name);
    if (!launch.run) hq_fault("there is no such kernel in these sources");
    set_geometry(call.grid, call.block, call.nparams);
    int nwords = 0, nfloats = 0;
    for (int i = 0; i < call.nparams; i++) {
        const bool is_float = call.floats >> i & 1;
        if (is_float && nfloats == kMaxFloats) hq_fault("more than %d floats", kMaxFloats);
        if (is_float) launch.floats[nfloats++] = __builtin_bit_cast(double, call.params[i]);
        else launch.params[nwords++] = call.params[i];
    }
    run_grid();
    call.done = true;
    go_home();
}

// Runs one launch on the memory that its parameters point to: each has 8 bytes, and bit i of `floats` says that it is a
// float. 0; or 1 after a fault, which is told in `said`. One call at a time.
extern "C" __attribute__((visibility("default"))) int hq_launch(const char* name, const uint32_t* grid,
    const uint32_t* block, int wave, const uint64_t* params, int nparams, uint32_t floats, char* said,
    unsigned long said_size) {
    static char stack[64 << 10] __attribute__((aligned(16)));
    launch = {};
    launch.said = said, launch.said_size = said_size, said[0] = 0;
    call = {name, grid, block, params, nparams, floats, false};
    hq_now = {0, 0, 0, 0, wave};
    of_block = {};
    for (Meeting& m : of_team) m = {};
    for (Meeting& m : of_wave) m = {};
    for (Fiber& f : fibers)
        if (f.stack) stacks[nstacks++] = f.stack, f.stack = nullptr;  // after a fault
    hq_switch(&launch.home, new_stack_top(stack + sizeof stack, run_call));
    return call.done ? 0 : 1;
}

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
