#include "../simd/portable.h"
#include "attention.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace bitdial {
namespace portable {
#include "pack_body.h"
#include "product_body.h"
#include "softmax_body.h"
#include "attention_body.h"
const AttentionOps attention_ops = {matmul_scratch, matmul, attention_scratch, attention, softmax_scratch, softmax, ROWS};
}  // namespace portable
}  // namespace bitdial
