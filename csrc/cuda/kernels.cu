// Every kernel by its name. BITDIAL_NATIVE_INT4: 1 where the tensor cores multiply 4-bit numbers (sm_80, 86, 87, 89), else 0.
#include "attention.h"
#include "dynamic.h"
#include "elements.h"
#include "pointwise.h"
#include "product.h"

KERNEL(conv_unsigned, ConvArgs, 128, 3) { convolve<false, false, BITDIAL_NATIVE_INT4 != 0, 64>(args); }
KERNEL(conv_wide_unsigned, ConvArgs, 256, 2) { convolve<false, false, BITDIAL_NATIVE_INT4 != 0, 128>(args); }
#ifndef BITDIAL_ONLY_KIND
KERNEL(conv_wide_signed, ConvArgs, 256, 2) { convolve<true, false, BITDIAL_NATIVE_INT4 != 0, 128>(args); }
KERNEL(conv_signed, ConvArgs, 128, 3) { convolve<true, false, BITDIAL_NATIVE_INT4 != 0, 64>(args); }
KERNEL(conv_elements_unsigned, ConvArgs, 128, 3) { convolve<false, true, BITDIAL_NATIVE_INT4 != 0, 64>(args); }
KERNEL(conv_elements_signed, ConvArgs, 128, 3) { convolve<true, true, BITDIAL_NATIVE_INT4 != 0, 64>(args); }
KERNEL(matmul_uu, MatMulArgs, 128, 2) { multiply_matrices<false, false>(args); }
KERNEL(matmul_us, MatMulArgs, 128, 2) { multiply_matrices<false, true>(args); }
KERNEL(matmul_su, MatMulArgs, 128, 2) { multiply_matrices<true, false>(args); }
KERNEL(matmul_ss, MatMulArgs, 128, 2) { multiply_matrices<true, true>(args); }
KERNEL(attention_rows16, AttentionArgs, 128, 2) { attend<16>(args); }
KERNEL(attention_rows32, AttentionArgs, 128, 2) { attend<32>(args); }
KERNEL(pointwise_kernel, PointwiseArgs, 256, 2) { pointwise(args); }
KERNEL(pool_kernel, WindowArgs, 256, 2) { over_window<false>(args); }
KERNEL(depthwise_kernel, WindowArgs, 256, 2) { over_window<true>(args); }
KERNEL(softmax_kernel, RowsArgs, 128, 2) { softmax_rows(args); }
KERNEL(layer_norm_kernel, RowsArgs, 128, 2) { normalize_rows(args); }
KERNEL(sum_kernel, RowsArgs, 128, 2) { sum_rows(args); }
KERNEL(shift_kernel, LowerArgs, 128, 2) { find_shifts(args); }
KERNEL(lower_kernel, LowerArgs, 256, 2) { lower(args); }
KERNEL(elements_kernel, ElementsArgs, 256, 2) { elements(args); }
KERNEL(whole_rows_kernel, WholeRowsArgs, 128, 2) { sum_whole_rows(args); }
#endif
