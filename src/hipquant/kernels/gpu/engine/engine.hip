// Every family of the engine in one translation unit.
#include "norm.hip"
#include "rope.hip"
#include "attention.hip"
#include "attention_prefill.hip"
#include "activation.hip"
#include "mat_vec_float.hip"
#include "sample.hip"
#include "read.hip"
