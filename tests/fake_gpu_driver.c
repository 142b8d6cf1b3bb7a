// A driver library without a GPU, for tests/gpu_devices.py: the symbols of either column of driver/gpu_symbols.py
// over host memory. Work is done at once, in order; a captured stream records it. Whatever a real driver would not
// forgive is an error here: a call without the right context, a stale handle, a free of something else. Kernels are
// run by whoever sets fake_run: tests/simulated_gpu.py simulates them.
// Compiled with -DHIP (and -DR0600 for the properties of ROCm 6) or -DCUDA, freestanding.

typedef unsigned long size_t;
typedef unsigned int uint;
void *aligned_alloc(size_t, size_t), *realloc(void *, size_t);
void *memcpy(void *, const void *, size_t), *memset(void *, int, size_t), *strcpy(char *, const char *);
char *strstr(const char *, const char *);
void free(void *);
int strcmp(const char *, const char *), strncmp(const char *, const char *, size_t);
size_t strlen(const char *);

#ifdef HIP
#define API(hip, cuda) hip
#else
#define API(hip, cuda) cuda
#endif
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define DEVICES 2
#define MAX_PARAMS 32
#define MAX_KERNELS 256
#define FILLED (2ul << 20)

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
       INVALID_CONTEXT = 201, INVALID_PTX = 218, INVALID_HANDLE = 400, NOT_FOUND = 500, UPDATE_FAILURE = 910 };
enum { MEMORY = 1, PINNED, STREAM, EVENT, MODULE, GRAPH, INSTANCE, KINDS };

// --- what the tests set and read ---

int fake_devices = DEVICES, fake_init_code, fake_fail_nth = -1, fake_fail_code;
int fake_lost;  // whether all calls behind the one that fails do, too
char fake_fail_symbol[64], fake_failed[64], fake_last_image[64];
int fake_calls, fake_live[KINDS], fake_clock, fake_launches, fake_wrong_context;
int fake_overlapping;   // launches that are allowed to overlap with the one in front; those in a graph count each time
int fake_version = API(70051831, 13000);  // of the driver
int fake_wave = 32;     // of the first HIP device: with 64 it is a gfx90a, too
int fake_fill = 0xCD;   // what new memory holds: all of it, or its first and last FILLED bytes
int fake_overruns;      // things whose end was written over, as found out when they are given back
size_t fake_used, fake_total = 64 << 20;
uint fake_geometry[7];
void *fake_last_stream;
int (*fake_count)(const char *name);                                        // parameters of a kernel
int (*fake_run)(const char *name, const uint *geometry, void **params);     // runs it; an error code

static int enter(const char *symbol) {
    int nth = __atomic_fetch_add(&fake_calls, 1, __ATOMIC_SEQ_CST);
    int behind = fake_lost && fake_fail_nth >= 0 && nth > fake_fail_nth;
    if (nth == fake_fail_nth || behind || !strcmp(symbol, fake_fail_symbol)) {
        strcpy(fake_failed, symbol);
        return fake_fail_code;
    }
    return 0;
}

#define FUNCTION(hip, cuda, ...)                                   \
    int API(hip, cuda)(__VA_ARGS__) {                              \
        int code = enter(TEXT(API(hip, cuda)));                    \
        if (code) return code;
#define END }

// --- contexts: CUDA's is a handle, HIP's a device number; each thread has its own current one ---

static __thread long current = API(1, 0);  // device + 1

static int device_of(int wanted) { return wanted >= 0 && wanted < fake_devices ? 0 : INVALID_DEVICE; }
static int need(long device) {
    if (current == device + 1) return 0;
    fake_wrong_context++;
    return INVALID_CONTEXT;
}
#define NEED_ANY if (!current) return INVALID_CONTEXT;

FUNCTION(hipInit, cuInit, uint flags) return flags ? INVALID_VALUE : fake_init_code; END
FUNCTION(hipDriverGetVersion, cuDriverGetVersion, int *v) *v = fake_version; return 0; END
FUNCTION(hipGetDeviceCount, cuDeviceGetCount, int *n) *n = fake_devices; return 0; END
FUNCTION(hipDeviceGet, cuDeviceGet, int *d, int i) *d = i; return device_of(i); END
FUNCTION(hipDeviceGetName, cuDeviceGetName, char *name, int len, int d)
    if (len < 16) return INVALID_VALUE;
    strcpy(name, d ? "Fake GPU two" : "Fake GPU one");
    return device_of(d); END
FUNCTION(hipDeviceTotalMem, cuDeviceTotalMem_v2, size_t *n, int d) *n = fake_total; return device_of(d); END
FUNCTION(hipMemGetInfo, cuMemGetInfo_v2, size_t *f, size_t *t)
    NEED_ANY *f = fake_total - fake_used; *t = fake_total; return 0; END
FUNCTION(hipDeviceSynchronize, cuCtxSynchronize, void) NEED_ANY return 0; END

#ifdef HIP
FUNCTION(hipSetDevice, none, int d) if (device_of(d)) return INVALID_DEVICE; current = d + 1; return 0; END
FUNCTION(hipGetDevice, none, int *d) *d = current - 1; return 0; END
#ifdef R0600
#define WARP 308
#define UNITS 388
#define ARCH 1160
FUNCTION(hipGetDevicePropertiesR0600, none, char *p, int d)
    memset(p, 0xAA, 1472);
#else
#define WARP 276
#define UNITS 336
#define ARCH 396
FUNCTION(hipGetDeviceProperties, none, char *p, int d)
    memset(p, 0xAA, 792);
#endif
    const int wide = d || fake_wave == 64;
    *(int *)(p + WARP) = wide ? 64 : 32;
    *(int *)(p + UNITS) = wide ? 104 : 48;
    strcpy(p + ARCH, wide ? "gfx90a:sramecc+:xnack-" : "gfx1100");
    return device_of(d); END
const char *hipGetErrorName(int code) {
    switch (code) {
    case OUT_OF_MEMORY: return "hipErrorOutOfMemory";
    case NO_DEVICE: return "hipErrorNoDevice";
    case INVALID_IMAGE: return "hipErrorInvalidImage";
    case 719: return "hipErrorLaunchFailure";
    }
    return "hipErrorUnknown";
}
#else
FUNCTION(none, cuDeviceGetAttribute, int *v, int which, int d)
    switch (which) {
    case 10: *v = 32; break;
    case 16: *v = d ? 40 : 132; break;
    case 75: *v = d ? 7 : 9; break;
    case 76: *v = d ? 5 : 0; break;
    default: return INVALID_VALUE;
    }
    return device_of(d); END
FUNCTION(none, cuDevicePrimaryCtxRetain, void **c, int d) *c = (void *)(0x1000L + d + 1); return device_of(d); END
FUNCTION(none, cuCtxSetCurrent, void *c) current = c ? (long)c - 0x1000 : 0; return 0; END
FUNCTION(none, cuCtxGetCurrent, void **c) *c = current ? (void *)(current + 0x1000) : 0; return 0; END
int cuGetErrorName(int code, const char **name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE"
          : code == INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE" : code == INVALID_PTX ? "CUDA_ERROR_INVALID_PTX"
          : code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : 0;
    return *name ? 0 : INVALID_VALUE;
}
#endif

// --- things: a header tells what a handle is, and a tail whether somebody wrote beyond the end ---

typedef struct { long magic, kind, device; size_t nbytes; } Thing;
#define MAGIC 0x600DF00D
#define HEADER 256  // as drivers align memory
#define TAIL 256
#define TAIL_BYTE 0xA5
static void *thing(int kind, size_t nbytes) {
    char *raw = aligned_alloc(HEADER, (HEADER + nbytes + TAIL + HEADER - 1) / HEADER * HEADER);
    if (!raw) return 0;
    *(Thing *)(raw + HEADER - sizeof(Thing)) = (Thing){MAGIC, kind, current - 1, nbytes};
    memset(raw + HEADER + nbytes, TAIL_BYTE, TAIL);
    __atomic_fetch_add(&fake_live[kind], 1, __ATOMIC_SEQ_CST);
    return raw + HEADER;
}
static Thing *header(void *p) { return (Thing *)p - 1; }
static int overrun(void *p) {
    const unsigned char *tail = (unsigned char *)p + header(p)->nbytes;
    for (int i = 0; i < TAIL; i++) if (tail[i] != TAIL_BYTE) return 1;
    return 0;
}
static int check(void *p, int kind) {
    if (!p || header(p)->magic != MAGIC || header(p)->kind != kind) return INVALID_HANDLE;
    return need(header(p)->device);
}
typedef struct {
    int kind;  // 1 a copy, 2 a fill, 3 a launch
    char name[64];
    uint geometry[7];
    int overlaps;
    size_t params[MAX_PARAMS];
    void *to;
    const void *from;
    size_t n;
} Node;
typedef struct { int count, capacity; Node *nodes; } Nodes;
static int end(void *p, int kind) {
    int code = check(p, kind);
    if (code) return code;
    __atomic_fetch_sub(&fake_live[kind], 1, __ATOMIC_SEQ_CST);
    if (kind == MEMORY) __atomic_fetch_sub(&fake_used, header(p)->nbytes, __ATOMIC_SEQ_CST);
    if (overrun(p)) __atomic_fetch_add(&fake_overruns, 1, __ATOMIC_SEQ_CST);
    if (kind == GRAPH || kind == INSTANCE) free(((Nodes *)p)->nodes);
    header(p)->magic = 0;
    free((char *)p - HEADER);
    return 0;
}

FUNCTION(hipMalloc, cuMemAlloc_v2, void **p, size_t n)
    NEED_ANY
    if (!n) return INVALID_VALUE;
    if (fake_used + n > fake_total || n > (1ul << 40)) return OUT_OF_MEMORY;
    if (!(*p = thing(MEMORY, n))) return OUT_OF_MEMORY;
    memset(*p, fake_fill, n < FILLED ? n : FILLED);
    if (n > FILLED) memset((char *)*p + n - FILLED, fake_fill, FILLED);
    __atomic_fetch_add(&fake_used, n, __ATOMIC_SEQ_CST);
    return 0; END
FUNCTION(hipFree, cuMemFree_v2, void *p) return end(p, MEMORY); END
FUNCTION(hipHostMalloc, cuMemHostAlloc, void **p, size_t n, uint flags)
    NEED_ANY
    if (!n || flags != 1) return INVALID_VALUE;
    *p = thing(PINNED, n);
    return 0; END
FUNCTION(hipHostFree, cuMemFreeHost, void *p) return end(p, PINNED); END

// --- streams and graphs ---

typedef struct { Nodes *capturing; } Stream;
typedef struct { char name[64]; } Kernel;

static int run(Node *node) {
    __atomic_fetch_add(&fake_clock, 1, __ATOMIC_SEQ_CST);
    if (node->kind == 1) memcpy(node->to, node->from, node->n);
    if (node->kind == 2) memset(node->to, node->geometry[0], node->n);
    if (node->kind == 3) {
        void *params[MAX_PARAMS];
        for (int i = 0; i < MAX_PARAMS; i++) params[i] = &node->params[i];
        __atomic_fetch_add(&fake_launches, 1, __ATOMIC_SEQ_CST);
        __atomic_fetch_add(&fake_overlapping, node->overlaps, __ATOMIC_SEQ_CST);
        if (fake_run) return fake_run(node->name, node->geometry, params);
    }
    return 0;
}
static void add(Nodes *to, const Node *node) {
    if (to->count == to->capacity) {
        to->capacity = 2 * to->capacity + 64;
        to->nodes = realloc(to->nodes, to->capacity * sizeof(Node));
    }
    to->nodes[to->count++] = *node;
}
static void set(Nodes *to, const Nodes *from) {
    to->count = 0;
    for (int i = 0; i < from->count; i++) add(to, &from->nodes[i]);
}
static Nodes *nodes(int kind) {
    Nodes *made = thing(kind, sizeof(Nodes));
    *made = (Nodes){0};
    return made;
}
static int give(void *stream, Node *node) {  // the NULL stream belongs to whatever device is current
    Stream *s = stream;
    int code = stream ? check(stream, STREAM) : 0;
    if (code) return code;
    if (!s || !s->capturing) return run(node);
    add(s->capturing, node);
    return 0;
}

FUNCTION(hipStreamCreateWithFlags, cuStreamCreate, void **s, uint flags)
    NEED_ANY
    if (flags != 1) return INVALID_VALUE;
    *s = thing(STREAM, sizeof(Stream));
    ((Stream *)*s)->capturing = 0;
    return 0; END
FUNCTION(hipStreamDestroy, cuStreamDestroy_v2, void *s)
    if (check(s, STREAM)) return INVALID_HANDLE;
    if (((Stream *)s)->capturing) end(((Stream *)s)->capturing, GRAPH);
    return end(s, STREAM); END
FUNCTION(hipStreamSynchronize, cuStreamSynchronize, void *s)
    if (s && check(s, STREAM)) return INVALID_HANDLE;
    return s && ((Stream *)s)->capturing ? 900 : 0; END
FUNCTION(hipStreamWaitEvent, cuStreamWaitEvent, void *s, void *e, uint flags)
    return (s && check(s, STREAM)) || check(e, EVENT) || flags ? INVALID_HANDLE : 0; END
FUNCTION(hipMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, void *to, const void *from, size_t n, void *s)
    Node node = {.kind = 1, .to = to, .from = from, .n = n};
    return give(s, &node); END
FUNCTION(hipMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, void *to, const void *from, size_t n, void *s)
    Node node = {.kind = 1, .to = to, .from = from, .n = n};
    return give(s, &node); END
FUNCTION(hipMemsetD8Async, cuMemsetD8Async, void *to, unsigned char byte, size_t n, void *s)
    Node node = {.kind = 2, .geometry = {byte}, .to = to, .n = n};
    return give(s, &node); END

FUNCTION(hipEventCreateWithFlags, cuEventCreate, void **e, uint flags)
    NEED_ANY if (flags) return INVALID_VALUE;
    *e = thing(EVENT, sizeof(int)); *(int *)*e = -1; return 0; END
FUNCTION(hipEventDestroy, cuEventDestroy_v2, void *e) return end(e, EVENT); END
FUNCTION(hipEventRecord, cuEventRecord, void *e, void *s)
    if (check(e, EVENT) || (s && check(s, STREAM))) return INVALID_HANDLE;
    *(int *)e = fake_clock; return 0; END
FUNCTION(hipEventSynchronize, cuEventSynchronize, void *e) return check(e, EVENT); END
FUNCTION(hipEventElapsedTime, cuEventElapsedTime, float *ms, void *from, void *to)
    if (check(from, EVENT) || check(to, EVENT)) return INVALID_HANDLE;
    *ms = *(int *)to - *(int *)from;
    return 0; END

FUNCTION(hipStreamBeginCapture, cuStreamBeginCapture_v2, void *s, int mode)
    if (check(s, STREAM) || ((Stream *)s)->capturing || mode != 2) return INVALID_VALUE;
    ((Stream *)s)->capturing = nodes(GRAPH);
    return 0; END
FUNCTION(hipStreamEndCapture, cuStreamEndCapture, void *s, void **graph)
    if (check(s, STREAM) || !((Stream *)s)->capturing) return INVALID_VALUE;
    *graph = ((Stream *)s)->capturing;
    ((Stream *)s)->capturing = 0;
    return 0; END
FUNCTION(hipGraphGetNodes, cuGraphGetNodes, void *graph, void *which, size_t *n)
    if (check(graph, GRAPH) || which) return INVALID_VALUE;
    *n = ((Nodes *)graph)->count;
    return 0; END
FUNCTION(hipGraphInstantiateWithFlags, cuGraphInstantiateWithFlags, void **e, void *graph, unsigned long long flags)
    if (check(graph, GRAPH) || flags) return INVALID_VALUE;
    set(*e = nodes(INSTANCE), graph);
    return 0; END
FUNCTION(hipGraphExecUpdate, cuGraphExecUpdate, void *e, void *graph, void **node, int *result)
    if (check(e, INSTANCE) || check(graph, GRAPH)) return INVALID_VALUE;
    *node = 0; *result = 0;
    Nodes *a = e, *b = graph;
    if (a->count != b->count) { *result = 2; return UPDATE_FAILURE; }
    set(e, graph);
    return 0; END
FUNCTION(hipGraphLaunch, cuGraphLaunch, void *e, void *s)
    if (check(e, INSTANCE) || (s && check(s, STREAM))) return INVALID_HANDLE;
    for (int i = 0; i < ((Nodes *)e)->count; i++) {
        int failed = run(&((Nodes *)e)->nodes[i]);
        if (failed) return failed;
    }
    return 0; END
FUNCTION(hipGraphDestroy, cuGraphDestroy, void *graph) return end(graph, GRAPH); END
FUNCTION(hipGraphExecDestroy, cuGraphExecDestroy, void *e) return end(e, INSTANCE); END

// --- modules and launches: behind the word "kernels:" in an image stand, between blanks, the only ones that it has ---

typedef struct { long count; char *listed; Kernel kernels[MAX_KERNELS]; } Module;

FUNCTION(hipModuleLoadDataEx, cuModuleLoadDataEx, void **m, const char *image, uint n, int *options, void **values)
    NEED_ANY
    if (strstr(image, ".version")) {
        if (strstr(image, "BROKEN")) {
            if (n == 2 && options[0] == 5 && options[1] == 6 && (long)values[1] > 99)
                strcpy(values[0], "ptxas application ptx input, line 4; fatal : Parsing error near 'BROKEN'");
            return INVALID_PTX;
        }
    } else if (strncmp(image, "\x7f" "ELF", 4)) return INVALID_IMAGE;
    memcpy(fake_last_image, image, 64);
    const char *listed = strstr(strncmp(image, "\x7f" "ELF", 4) ? image : image + 64, "kernels:");
    Module *made = *m = thing(MODULE, sizeof(Module) + (listed ? strlen(listed) + 1 : 0));
    made->count = 0;
    made->listed = listed ? strcpy((char *)(made + 1), listed) : 0;
    return 0; END
FUNCTION(hipModuleUnload, cuModuleUnload, void *m) return end(m, MODULE); END
static int lists(const char *listed, const char *name) {
    size_t n = strlen(name);
    while ((listed = strstr(listed, name)))
        if (listed[-1] == ' ' && listed[n] == ' ') return 1;
        else listed += n;
    return 0;
}
FUNCTION(hipModuleGetFunction, cuModuleGetFunction, void **f, Module *m, const char *name)
    if (check(m, MODULE)) return INVALID_HANDLE;
    if (!strncmp(name, "missing", 7) || strlen(name) > 63 || (m->listed && !lists(m->listed, name))) return NOT_FOUND;
    Kernel *kernel = &m->kernels[m->count++ % MAX_KERNELS];
    strcpy(kernel->name, name);
    *f = kernel;
    return 0; END
static int launch(Kernel *f, const uint *g, int overlaps, void *s, void **params, void **extra) {
    NEED_ANY
    if (extra || g[3] * g[4] * g[5] > 1024 || g[1] > 65535 || g[2] > 65535) return INVALID_VALUE;
    Node node = {.kind = 3, .overlaps = overlaps};
    strcpy(node.name, f->name);
    memcpy(node.geometry, g, sizeof node.geometry);
    memcpy(fake_geometry, g, sizeof fake_geometry);
    fake_last_stream = s;
    int n = fake_count ? fake_count(f->name) : 0;
    if (n > MAX_PARAMS) return INVALID_VALUE;
    for (int i = 0; i < n; i++) memcpy(&node.params[i], params[i], 8);
    return give(s, &node);
}
FUNCTION(hipModuleLaunchKernel, cuLaunchKernel, Kernel *f, uint gx, uint gy, uint gz, uint bx, uint by, uint bz,
         uint shared, void *s, void **params, void **extra)
    const uint geometry[] = {gx, gy, gz, bx, by, bz, shared};
    return launch(f, geometry, 0, s, params, extra); END
#ifdef CUDA
typedef struct { int id; char pad[4]; int value[16]; } Attribute;
typedef struct { uint geometry[7]; void *stream; const Attribute *attributes; uint count; } Config;
FUNCTION(none, cuLaunchKernelEx, const Config *c, Kernel *f, void **params, void **extra)
    if (c->count > 1 || (c->count && (c->attributes->id != 6 || c->attributes->value[0] != 1))) return INVALID_VALUE;
    return launch(f, c->geometry, c->count, c->stream, params, extra); END
#endif
