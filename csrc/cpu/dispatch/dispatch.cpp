// Which instruction sets this processor runs, and the table of kernels of each.
#include "../kernels.h"

#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bitdial {

#define BITDIAL_DECLARE(folder, name, result, ...) result name(__VA_ARGS__);
#define BITDIAL_ENTRY(folder, name, ...) name,
#define BITDIAL_TABLE(isa, others, supported)                                     \
    namespace others {                                                            \
    BITDIAL_OTHER_KERNELS(BITDIAL_DECLARE)                                        \
    }                                                                             \
    namespace isa {                                                               \
    using namespace others;                                                       \
    BITDIAL_PRODUCT_KERNELS(BITDIAL_DECLARE)                                      \
    static const Kernels table_of_set = {BITDIAL_KERNEL_LIST(BITDIAL_ENTRY)};     \
    }
BITDIAL_ISA_LIST(BITDIAL_TABLE, )

#if defined(__x86_64__)
// It also asks the operating system whether it saves the wide registers.
#define BITDIAL_HAS(name) __builtin_cpu_supports(name)
// Not every compiler that makes AVX-VNNI instructions knows its name there: AVX2 answers for the registers, a bit of the processor's
// for the instructions.
static bool has_avx_vnni() {
    unsigned int a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#define HAS_AVX_VNNI has_avx_vnni()
#elif defined(__aarch64__) && defined(__linux__)
static bool has(const char* name) {
    constexpr unsigned long kDotProduct = 1ul << 20, kMixed = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
    const bool dot_product = (getauxval(AT_HWCAP) & kDotProduct) != 0;
    return std::strcmp(name, "i8mm") == 0 ? dot_product && (getauxval(AT_HWCAP2) & kMixed) != 0 : dot_product;
}
#define BITDIAL_HAS(name) has(name)
#else
#define BITDIAL_HAS(name) false
#endif

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
#define BITDIAL_NAME(isa, others, supported) \
    if (supported) names.push_back(#isa);
    BITDIAL_ISA_LIST(BITDIAL_NAME, BITDIAL_HAS)
    return names;
}

const Kernels& kernels_of(const std::string& isa) {
#define BITDIAL_FIND(name, others, supported) \
    if (isa == #name && (supported)) return name::table_of_set;
    BITDIAL_ISA_LIST(BITDIAL_FIND, BITDIAL_HAS)
    throw std::invalid_argument("instruction set '" + isa + "' is not supported here");
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
