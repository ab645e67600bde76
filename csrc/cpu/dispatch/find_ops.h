// Finding the operators of one instruction set in a table of all of them.
#pragma once
#include <cstddef>
#include <cstring>

namespace bitdial {

template <typename Ops>
struct OpsOfIsa {
    const char* isa;
    Ops ops;
};

// Null if the table has none of that name.
template <typename Ops, std::size_t kCount>
const Ops* find_ops(const OpsOfIsa<Ops> (&table)[kCount], const char* isa) {
    for (const OpsOfIsa<Ops>& entry : table) {
        if (std::strcmp(entry.isa, isa) == 0) return &entry.ops;
    }
    return nullptr;
}

}  // namespace bitdial
