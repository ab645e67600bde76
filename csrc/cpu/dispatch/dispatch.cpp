#include "dispatch.h"

#include <algorithm>
#include <cstring>

#include "../isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bitdial {

#define BITDIAL_DECLARE(isa) \
    namespace isa {         \
    extern const ConvKernels conv_kernels; \
    }
BITDIAL_ISA_LIST(BITDIAL_DECLARE)
#undef BITDIAL_DECLARE

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool supports(const char* isa) {
    __builtin_cpu_init();
    if (!std::strcmp(isa, "avx512vnni"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
    if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return !std::strcmp(isa, "portable");
}
#else
bool supports(const char* isa) { return !std::strcmp(isa, "portable"); }
#endif

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
#define BITDIAL_NAME(isa) \
    if (supports(#isa)) names.push_back(#isa);
    BITDIAL_ISA_LIST(BITDIAL_NAME)
#undef BITDIAL_NAME
    return names;
}

const ConvKernels* conv_kernels(const std::string& isa) {
    const auto names = supported_isas();
    if (std::find(names.begin(), names.end(), isa) == names.end()) return nullptr;
#define BITDIAL_FIND(name) \
    if (isa == #name) return &name::conv_kernels;
    BITDIAL_ISA_LIST(BITDIAL_FIND)
#undef BITDIAL_FIND
    return nullptr;
}

std::string cpu_name() {
#if defined(__x86_64__)
    unsigned int r[12] = {0}, top = __get_cpuid_max(0x80000000u, nullptr);
    if (top < 0x80000004u) return "";
    for (unsigned int i = 0; i < 3; i++) __get_cpuid(0x80000002u + i, r + 4 * i, r + 4 * i + 1, r + 4 * i + 2, r + 4 * i + 3);
    char text[49] = {0};
    std::memcpy(text, r, 48);
    std::string s = text;
    s.erase(0, s.find_first_not_of(' '));
    s.erase(s.find_last_not_of(' ') + 1);
    return s;
#else
    return "";
#endif
}

}  // namespace bitdial
