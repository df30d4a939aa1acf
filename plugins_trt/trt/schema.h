// The operators as plugins_trt/schema.py defines them. Written by: python -m plugins_trt.header

#pragma once

#include "operator.h"

namespace monoedge::schema
{

inline constexpr char kNamespace[]{"monoedge"};
inline constexpr char kVersion[]{"1"};

enum Dim : std::int32_t
{
    kBatch,
    kSequence,
    kIn,
    kInter,
    kOut,
    kDims,
};

inline constexpr char const* kDimNames[kDims]{"batch", "sequence", "in", "inter", "out"};

namespace FusedMoE
{

enum Input : std::int32_t
{
    kHiddenStates,
    kVisualMask,
    kTextGateUp,
    kTextDown,
    kVisualGateUp,
    kVisualDown,
    kInputs,
};

inline constexpr Tensor kInputTensors[kInputs]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
    {"text_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}},
    {"visual_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
    {"visual_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}},
};

inline constexpr Operator kOperator{"FusedMoE", kInputs, kInputTensors,
    {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}}};

} // namespace FusedMoE

namespace ExpertLinear
{

enum Input : std::int32_t
{
    kHiddenStates,
    kVisualMask,
    kTextWeight,
    kVisualWeight,
    kInputs,
};

inline constexpr Tensor kInputTensors[kInputs]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}},
    {"visual_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}},
};

inline constexpr Operator kOperator{"ExpertLinear", kInputs, kInputTensors,
    {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}}};

} // namespace ExpertLinear

} // namespace monoedge::schema
