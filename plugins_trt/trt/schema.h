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

/// Inputs that all operators of the family have, first and in this order.
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
};

} // namespace FusedMoE

/// Inputs that all operators of the family have, first and in this order.
namespace ExpertLinear
{

enum Input : std::int32_t
{
    kHiddenStates,
    kVisualMask,
    kTextWeight,
    kVisualWeight,
};

} // namespace ExpertLinear

inline constexpr Tensor kFusedMoEInputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
    {"text_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}},
    {"visual_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
    {"visual_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}},
};

inline constexpr Tensor kExpertLinearInputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}},
    {"visual_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}},
};

inline constexpr Tensor kFusedMoETextW8A16Inputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 6, kNone},
    {"text_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 7, kNone},
    {"visual_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
    {"visual_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}},
    {"text_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
    {"text_down_scale", Kind::kFloat32, 1, {{1, kIn}}},
};

inline constexpr Tensor kFusedMoEW8A16Inputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 6, kNone},
    {"text_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 7, kNone},
    {"visual_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 8, kNone},
    {"visual_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 9, kNone},
    {"text_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
    {"text_down_scale", Kind::kFloat32, 1, {{1, kIn}}},
    {"visual_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
    {"visual_down_scale", Kind::kFloat32, 1, {{1, kIn}}},
};

inline constexpr Tensor kFusedMoETextW8A8Inputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 6, 7},
    {"text_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 8, 9},
    {"visual_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
    {"visual_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}},
    {"text_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
    {"text_gate_up_input_scale", Kind::kFloat32, 0, {}},
    {"text_down_scale", Kind::kFloat32, 1, {{1, kIn}}},
    {"text_down_input_scale", Kind::kFloat32, 0, {}},
};

inline constexpr Tensor kFusedMoEW8A8Inputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 6, 7},
    {"text_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 8, 9},
    {"visual_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 10, 11},
    {"visual_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 12, 13},
    {"text_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
    {"text_gate_up_input_scale", Kind::kFloat32, 0, {}},
    {"text_down_scale", Kind::kFloat32, 1, {{1, kIn}}},
    {"text_down_input_scale", Kind::kFloat32, 0, {}},
    {"visual_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
    {"visual_gate_up_input_scale", Kind::kFloat32, 0, {}},
    {"visual_down_scale", Kind::kFloat32, 1, {{1, kIn}}},
    {"visual_down_input_scale", Kind::kFloat32, 0, {}},
};

inline constexpr Tensor kExpertLinearTextW8A16Inputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 4, kNone},
    {"visual_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}},
    {"text_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
};

inline constexpr Tensor kExpertLinearW8A16Inputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 4, kNone},
    {"visual_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 5, kNone},
    {"text_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
    {"visual_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
};

inline constexpr Tensor kExpertLinearTextW8A8Inputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 4, 5},
    {"visual_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}},
    {"text_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
    {"text_weight_input_scale", Kind::kFloat32, 0, {}},
};

inline constexpr Tensor kExpertLinearW8A8Inputs[]{
    {"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
    {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
    {"text_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 4, 5},
    {"visual_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 6, 7},
    {"text_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
    {"text_weight_input_scale", Kind::kFloat32, 0, {}},
    {"visual_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
    {"visual_weight_input_scale", Kind::kFloat32, 0, {}},
};

inline constexpr Operator kOperators[]{
    {"FusedMoE", Family::kFusedMoE, 6, kFusedMoEInputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}}},
    {"ExpertLinear", Family::kExpertLinear, 4, kExpertLinearInputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}}},
    {"FusedMoETextW8A16", Family::kFusedMoE, 8, kFusedMoETextW8A16Inputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}}},
    {"FusedMoEW8A16", Family::kFusedMoE, 10, kFusedMoEW8A16Inputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}}},
    {"FusedMoETextW8A8", Family::kFusedMoE, 10, kFusedMoETextW8A8Inputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}}},
    {"FusedMoEW8A8", Family::kFusedMoE, 14, kFusedMoEW8A8Inputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}}},
    {"ExpertLinearTextW8A16", Family::kExpertLinear, 5, kExpertLinearTextW8A16Inputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}}},
    {"ExpertLinearW8A16", Family::kExpertLinear, 6, kExpertLinearW8A16Inputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}}},
    {"ExpertLinearTextW8A8", Family::kExpertLinear, 6, kExpertLinearTextW8A8Inputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}}},
    {"ExpertLinearW8A8", Family::kExpertLinear, 8, kExpertLinearW8A8Inputs,
        {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}}},
};

} // namespace monoedge::schema
