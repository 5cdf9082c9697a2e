// A decoder as a step reads it, and what a step is given.
#pragma once
#include "cpu_low_rank.hpp"
#include "cpu_products.hpp"

struct Layer {
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm;
    Linear qkv, output, up, down;
    void *keys, *values;  // [pages, slots, kv_heads, head_dim]
    int64_t window;       // 0: none
};

struct Model {
    int64_t num_layers, width, heads, kv_heads, head_dim, inner, page_slots, is_half, vocab, is_half_table;
    float eps, head_eps;
    const float *final_norm, *inverse;  // inverse frequencies [head_dim / 2], or none
    const void *table;  // embeddings [vocab, width]
    Layer *layers;
};

struct Step {
    const int64_t *ids, *last_ids;  // an id below zero is the last one of slot -1 - id
    void *logits;                   // [tokens, rows of the head] in the model's dtype
    const Weight *head;
    const int64_t *positions, *slots;
    const int32_t *contexts, *tables;
    int64_t table_ld, tokens, threads;
};

// A step of requests with any number of new tokens each.
struct Prompts {
    const int64_t *ids;
    void *hidden;  // [tokens, width] behind the last norm
    const int64_t *positions, *slots;
    const int32_t *starts, *contexts, *tables;  // starts [requests + 1]
    int64_t table_ld, requests, tokens, threads;
};

constexpr int64_t BAD_ID = -1, NO_MEMORY = -2;  // an id that is none of the vocabulary's; a step without memory
