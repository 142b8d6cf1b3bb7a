// What lanes of a simulated team or wave do together: shuffles, matrix products, loads of matrices; and copies under way.
// Part of simulate.cpp.
#pragma once
#include "simulate_fibers.h"

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
