// The operators as plugins_trt/schema.py defines them. Written by: python -m plugins_trt.header

#pragma once

#include "operator.h"

namespace monoedge::schema
{

inline constexpr char kNamespace[]{"monoedge"};
inline constexpr char kVersion[]{"1"};

enum Dim : std::int32_t { kBatch, kSequence, kIn, kInter, kOut, kDims };
inline constexpr char const* kDimNames[kDims]{"batch", "sequence", "in", "inter", "out"};

// Most tensors are the same in several operators.
inline constexpr Tensor hidden_states{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}};
inline constexpr Tensor visual_mask{"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}};
inline constexpr Tensor text_gate_up{"text_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}};
inline constexpr Tensor text_down{"text_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}};
inline constexpr Tensor visual_gate_up{"visual_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}};
inline constexpr Tensor visual_down{"visual_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}};
inline constexpr Tensor output_in{"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}};
inline constexpr Tensor text_weight{"text_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}};
inline constexpr Tensor visual_weight{"visual_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}};
inline constexpr Tensor output_out{"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}};
inline constexpr Tensor text_gate_up_int8{"text_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}};
inline constexpr Tensor text_down_int8{"text_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}};
inline constexpr Tensor text_gate_up_scale{"text_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}};
inline constexpr Tensor text_down_scale{"text_down_scale", Kind::kFloat32, 1, {{1, kIn}}};
inline constexpr Tensor visual_gate_up_int8{"visual_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}};
inline constexpr Tensor visual_down_int8{"visual_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}};
inline constexpr Tensor visual_gate_up_scale{"visual_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}};
inline constexpr Tensor visual_down_scale{"visual_down_scale", Kind::kFloat32, 1, {{1, kIn}}};
inline constexpr Tensor text_gate_up_input_scale{"text_gate_up_input_scale", Kind::kFloat32, 0, {}};
inline constexpr Tensor text_down_input_scale{"text_down_input_scale", Kind::kFloat32, 0, {}};
inline constexpr Tensor visual_gate_up_input_scale{"visual_gate_up_input_scale", Kind::kFloat32, 0, {}};
inline constexpr Tensor visual_down_input_scale{"visual_down_input_scale", Kind::kFloat32, 0, {}};
inline constexpr Tensor text_weight_int8{"text_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}};
inline constexpr Tensor text_weight_scale{"text_weight_scale", Kind::kFloat32, 1, {{1, kOut}}};
inline constexpr Tensor visual_weight_int8{"visual_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}};
inline constexpr Tensor visual_weight_scale{"visual_weight_scale", Kind::kFloat32, 1, {{1, kOut}}};
inline constexpr Tensor text_weight_input_scale{"text_weight_input_scale", Kind::kFloat32, 0, {}};
inline constexpr Tensor visual_weight_input_scale{"visual_weight_input_scale", Kind::kFloat32, 0, {}};

inline constexpr Operator kOperators[]{
    {"FusedMoE", Family::kFusedMoE, output_in, 6, {hidden_states, visual_mask, text_gate_up, text_down, visual_gate_up,
        visual_down}},
    {"ExpertLinear", Family::kExpertLinear, output_out, 4, {hidden_states, visual_mask, text_weight, visual_weight}},
    {"FusedMoETextW8A16", Family::kFusedMoE, output_in, 8, {hidden_states, visual_mask, text_gate_up_int8,
        text_down_int8, visual_gate_up, visual_down, text_gate_up_scale, text_down_scale}},
    {"FusedMoEW8A16", Family::kFusedMoE, output_in, 10, {hidden_states, visual_mask, text_gate_up_int8, text_down_int8,
        visual_gate_up_int8, visual_down_int8, text_gate_up_scale, text_down_scale, visual_gate_up_scale,
        visual_down_scale}},
    {"FusedMoETextW8A8", Family::kFusedMoE, output_in, 10, {hidden_states, visual_mask, text_gate_up_int8,
        text_down_int8, visual_gate_up, visual_down, text_gate_up_scale, text_gate_up_input_scale, text_down_scale,
        text_down_input_scale}},
    {"FusedMoEW8A8", Family::kFusedMoE, output_in, 14, {hidden_states, visual_mask, text_gate_up_int8, text_down_int8,
        visual_gate_up_int8, visual_down_int8, text_gate_up_scale, text_gate_up_input_scale, text_down_scale,
        text_down_input_scale, visual_gate_up_scale, visual_gate_up_input_scale, visual_down_scale,
        visual_down_input_scale}},
    {"ExpertLinearTextW8A16", Family::kExpertLinear, output_out, 5, {hidden_states, visual_mask, text_weight_int8,
        visual_weight, text_weight_scale}},
    {"ExpertLinearW8A16", Family::kExpertLinear, output_out, 6, {hidden_states, visual_mask, text_weight_int8,
        visual_weight_int8, text_weight_scale, visual_weight_scale}},
    {"ExpertLinearTextW8A8", Family::kExpertLinear, output_out, 6, {hidden_states, visual_mask, text_weight_int8,
        visual_weight, text_weight_scale, text_weight_input_scale}},
    {"ExpertLinearW8A8", Family::kExpertLinear, output_out, 8, {hidden_states, visual_mask, text_weight_int8,
        visual_weight_int8, text_weight_scale, text_weight_input_scale, visual_weight_scale,
        visual_weight_input_scale}},
};

} // namespace monoedge::schema
