// Rearranging bytes; see copy.h.
#pragma once
#include "../simd/simd.h"
#include "copy.h"
#include "transpose.h"

namespace bitdial {
namespace BITDIAL_ISA {

struct CopyAxis {
    int64_t extent, from, to;  // strides
    const int32_t* gather;     // null: i itself
};

static inline int64_t source_offset(const CopyAxis& axis, int64_t i) {
    return (axis.gather != nullptr ? axis.gather[i] : i) * axis.from;
}

static inline void copy_run(const uint8_t* from, uint8_t* to, int64_t length) {
    if (length >= 4 * BYTES) {  // the library's is best for long runs
        __builtin_memcpy(to, from, static_cast<uint64_t>(length));
        return;
    }
    int64_t i = 0;
    for (; i + BYTES <= length; i += BYTES) store(to + i, load(from + i));
    const int32_t rest = static_cast<int32_t>(length - i);
    if (rest > 0) store(to + i, load(from + i, rest), rest);
}

static inline void copy_one_by_one(const CopyAxis& axis, const uint8_t* from, uint8_t* to) {
    if (axis.gather != nullptr && axis.from == 1 && axis.to == 1) {
        for (int64_t i = 0; i < axis.extent; ++i) to[i] = from[axis.gather[i]];
    } else {
        for (int64_t i = 0; i < axis.extent; ++i) to[i * axis.to] = from[source_offset(axis, i)];
    }
}

// Axes 0..count-1 around the innermost work, which takes the axes that `inner` names last.
struct CopyPlan {
    CopyAxis axis[7];
    int32_t count;
    enum { kRun, kTranspose, kOneByOne } kind;
    CopyAxis rows, columns;  // source adjacent along columns, destination along rows; a run or single axis is in `rows`
};

static void copy_nested(const CopyPlan& plan, int32_t depth, const uint8_t* from, uint8_t* to) {
    if (depth < plan.count) {
        const CopyAxis& axis = plan.axis[depth];
        for (int64_t i = 0; i < axis.extent; ++i) {
            copy_nested(plan, depth + 1, from + source_offset(axis, i), to + i * axis.to);
        }
    } else if (plan.kind == CopyPlan::kRun) {
        copy_run(from, to, plan.rows.extent);
    } else if (plan.kind == CopyPlan::kTranspose) {
        transpose(from, plan.rows.from, plan.rows.extent, plan.columns.extent, to, plan.columns.to);
    } else {
        copy_one_by_one(plan.rows, from, to);
    }
}

// Removes axis k of the plan's loops and returns it.
static CopyAxis take_axis(CopyPlan& plan, int32_t k) {
    const CopyAxis taken = plan.axis[k];
    for (int32_t i = k; i + 1 < plan.count; ++i) plan.axis[i] = plan.axis[i + 1];
    --plan.count;
    return taken;
}

static CopyPlan plan_copy(const CopyArgs& a, int32_t row0, int32_t row1) {
    CopyPlan plan = {};
    for (int32_t k = 0; k < 6; ++k) {
        CopyAxis axis = {a.extent[k], a.src_stride[k], a.dst_stride[k], k == a.gather_axis ? a.gather : nullptr};
        if (k == 0) axis.extent = row1 - row0;
        if (k == 0 && axis.gather != nullptr) axis.gather += row0;
        if (axis.extent == 1 && axis.gather == nullptr) continue;
        int32_t place = plan.count++;  // insertion keeps falling destination strides, and order among equals
        for (; place > 0 && plan.axis[place - 1].to < axis.to; --place) plan.axis[place] = plan.axis[place - 1];
        plan.axis[place] = axis;
    }
    for (int32_t k = plan.count - 2; k >= 0; --k) {
        CopyAxis& outer = plan.axis[k];
        const CopyAxis inner = plan.axis[k + 1];
        if (outer.gather == nullptr && inner.gather == nullptr && outer.to == inner.extent * inner.to &&
            outer.from == inner.extent * inner.from) {
            outer = {outer.extent * inner.extent, inner.from, inner.to, nullptr};
            take_axis(plan, k + 1);
        }
    }
    if (plan.count == 0) {
        plan.rows = {1, 1, 1, nullptr};
        plan.kind = CopyPlan::kRun;
        return plan;
    }
    plan.rows = take_axis(plan, plan.count - 1);
    plan.kind = CopyPlan::kOneByOne;
    if (plan.rows.to != 1 || plan.rows.gather != nullptr) return plan;
    if (plan.rows.from == 1) {
        plan.kind = CopyPlan::kRun;
        return plan;
    }
    for (int32_t k = 0; k < plan.count; ++k) {
        if (plan.axis[k].from == 1 && plan.axis[k].gather == nullptr) {
            plan.columns = take_axis(plan, k);
            plan.kind = CopyPlan::kTranspose;
            break;
        }
    }
    return plan;
}

void copy(const CopyArgs& a, int32_t row0, int32_t row1) {
    for (int32_t k = 1; k < 6; ++k) {
        if (a.extent[k] == 0) return;
    }
    if (row1 <= row0) return;
    const bool gathered = a.gather != nullptr && a.gather_axis == 0;
    const int64_t first = gathered ? 0 : row0 * a.src_stride[0];  // gathered samples keep their own numbers
    copy_nested(plan_copy(a, row0, row1), 0, a.src + a.src_offset + first, a.dst + a.dst_offset + row0 * a.dst_stride[0]);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
