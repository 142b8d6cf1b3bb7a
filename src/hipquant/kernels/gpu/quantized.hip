// Every family in one translation unit.
#include "quantize.hip"
#include "dequantize.hip"
#include "get_rows.hip"
#include "dequantize_mat_vec.hip"
#include "mat_vec.hip"
#include "mat_mat.hip"
