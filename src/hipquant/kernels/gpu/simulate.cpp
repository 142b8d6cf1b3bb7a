// Runs simulated kernels, each block's threads as fibers: one program for all kernels of its sources. In a process of
// its own, started by toolchain/simulate.py, it reads launches and writes the arrays back (hq_simulate), and ends at
// the first fault with a sentence on stderr. As a library it runs them on the caller's memory (hq_launch) and gives the
// sentence back.
#include "simulate_fibers.h"
#include "simulate_lanes.h"

extern "C" {
// The kernels of the sources and the end of what is in shared memory: generated, and linked last.
struct hq_kernel {
    const char* name;
    void (*run)();
};
extern const hq_kernel hq_kernels[];
extern char hq_shared_end[];
}
HQ_SHARED char shared_begin[8] = {1};  // linked first

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
