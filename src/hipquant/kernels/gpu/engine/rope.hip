// `rope_store_kv_f16`: queries and keys are rotated by their position; keys and values go to the cache as halves.
// Block (4 heads, token): the heads of queries, then those of keys, then those of values. A thread takes a pair.
#include "device.h"

HQ_KERNEL(256)
rope_store_kv_f16(float* qkv, uint16_t* k_cache, uint16_t* v_cache, const float* rope, const int* position,
                  const int* slot, int n_head, int n_head_kv, int head_dim, int n_rot, int n_context) {
    let_next_begin();
    wait_for_inputs();
    const uint32_t token = block_y();
    const int head = (int)block_x() * 4 + thread_y(), heads = n_head + 2 * n_head_kv, at = position[token];
    if (head >= heads) return;
    const bool query = head < n_head, value = head >= n_head + n_head_kv;
    float* from = qkv + ((int64_t)token * heads + head) * head_dim;
    const float* angles = rope + (int64_t)at * n_rot;
    const int kv_head = value ? head - n_head - n_head_kv : head - n_head;
    uint16_t* to = (value ? v_cache : k_cache) +
                   (((int64_t)slot[token] * n_head_kv + (query ? 0 : kv_head)) * n_context + at) * head_dim;
    for (int i = 2 * thread_x(); i < head_dim; i += 128) {
        float a = from[i], b = from[i + 1];
        if (!value && i < n_rot) {
            const float c = angles[i], s = angles[i + 1], first = a * c - b * s;
            b = a * s + b * c;
            a = first;
        }
        if (query) from[i] = a, from[i + 1] = b;
        else *(uint32_t*)(to + i) = float_to_half(a) | (uint32_t)float_to_half(b) << 16;
    }
}
