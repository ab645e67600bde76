#include "../simd/avx512vnni.h"
#include "attention.h"

namespace bitdial {
namespace avx512vnni {
#include "pack_body.h"
#include "product_body.h"
#include "softmax_body.h"
#include "attention_body.h"
const AttentionOps attention_ops = {matmul_scratch, matmul, attention_scratch, attention, softmax_scratch, softmax, ROWS};
}  // namespace avx512vnni
}  // namespace bitdial
