// Which instruction sets this processor runs, and their kernels.
#pragma once
#include <string>
#include <vector>

#include "../conv/conv_args.h"
#include "../simple_ops.h"

namespace bitdial {

// Names of the sets that the processor and the operating system support, best first; "portable" is always last.
std::vector<std::string> supported_isas();
// Null if the set is not built in or not supported here.
const ConvKernels* conv_kernels(const std::string& isa);
// Product name of the processor, or "" where it cannot be told.
std::string cpu_name();

}  // namespace bitdial
