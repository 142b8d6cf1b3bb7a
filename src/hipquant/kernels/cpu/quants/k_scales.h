// The 6-bit scales and mins that Q4_K and Q5_K share: 12 bytes for 8 sub-blocks of 32.
// Sub-blocks 0..3: low six bits of bytes i and i + 4. Sub-blocks 4..7: nibbles of byte i + 4, and above them the two
// high bits of bytes i - 4 (scale) and i (min).
#pragma once
#include "../slice.h"

HQ_INLINE int k_scale(const uint8_t* b, int i) { return i < 4 ? b[i] & 63 : (b[i + 4] & 15) | (b[i - 4] >> 6) << 4; }
HQ_INLINE int k_min(const uint8_t* b, int i) { return i < 4 ? b[i + 4] & 63 : b[i + 4] >> 4 | (b[i] >> 6) << 4; }
HQ_INLINE void write_k_scales(uint8_t* b, const int8_t* scale, const int8_t* minimum) {
    for (int i = 0; i < 4; i++) {
        const int sc = scale[i + 4], m = minimum[i + 4];
        b[i] = (uint8_t)(scale[i] | (sc >> 4) << 6);
        b[i + 4] = (uint8_t)(minimum[i] | (m >> 4) << 6);
        b[i + 8] = (uint8_t)((sc & 15) | (m & 15) << 4);
    }
}

// The same of 16 rows: [slice][row] low nibbles of scale and min; [pair of slices][row] their high bits.
struct KScales {
    uint16_t d[16], dmin[16];
    uint8_t low[8][16], high[4][16];

    HQ_INLINE void pack(KScales& p, uint16_t d, uint16_t dmin, const uint8_t* scales, int row) {
        p.d[row] = d;
        p.dmin[row] = dmin;
        for (int s = 0; s < 8; s++) {
            const int sc = k_scale(scales, s), m = k_min(scales, s);
            p.low[s][row] = (uint8_t)((sc & 15) | (m & 15) << 4);
            const int high = (sc >> 4 | (m >> 4) << 2) << 4 * (s % 2);
            p.high[s / 2][row] = (uint8_t)(s % 2 ? p.high[s / 2][row] | high : high);
        }
    }
    HQ_INLINE void unpack(const KScales& p, int s, int at, vf* scale, vf* min) {
        const vi lo = bytes_to_ints(p.low[s] + at), hi = bytes_to_ints(p.high[s / 2] + at) >> 4 * (s % 2);
        *scale = load_halves(p.d + at) * to_float((lo & 15) | (hi & 3) << 4);
        *min = -load_halves(p.dmin + at) * to_float(lo >> 4 | (hi & 12) << 2);
    }
};
