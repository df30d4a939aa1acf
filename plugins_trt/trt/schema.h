// The operators as plugins_trt/schema.py defines them. Written by: python -m plugins_trt.header

#pragma once

#include "operator.h"

namespace monoedge::schema
{

inline constexpr char kNamespace[]{"monoedge"};
inline constexpr char kVersion[]{"1"};

enum Dim : std::int32_t { kBatch, kSequence, kIn, kInter, kOut, kDims };
inline constexpr char const* kDimNames[kDims]{"batch", "sequence", "in", "inter", "out"};

// Inputs that all operators of a family have, first and in this order.

namespace FusedMoE
{
enum Input : std::int32_t { kHiddenStates, kVisualMask, kTextGateUp, kTextDown, kVisualGateUp, kVisualDown };
}

namespace ExpertLinear
{
enum Input : std::int32_t { kHiddenStates, kVisualMask, kTextWeight, kVisualWeight };
}

inline constexpr Operator kOperators[]{
    {"FusedMoE", Family::kFusedMoE, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
        6, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
            {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
            {"text_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
            {"text_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}},
            {"visual_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
            {"visual_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}}}},
    {"ExpertLinear", Family::kExpertLinear, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}},
        4, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
            {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
            {"text_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}},
            {"visual_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}}}},
    {"FusedMoETextW8A16", Family::kFusedMoE, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
        8, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
            {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
            {"text_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 6, kNone},
            {"text_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 7, kNone},
            {"visual_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
            {"visual_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}},
            {"text_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
            {"text_down_scale", Kind::kFloat32, 1, {{1, kIn}}}}},
    {"FusedMoEW8A16", Family::kFusedMoE, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
        10, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
            {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
            {"text_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 6, kNone},
            {"text_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 7, kNone},
            {"visual_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 8, kNone},
            {"visual_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 9, kNone},
            {"text_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
            {"text_down_scale", Kind::kFloat32, 1, {{1, kIn}}},
            {"visual_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
            {"visual_down_scale", Kind::kFloat32, 1, {{1, kIn}}}}},
    {"FusedMoETextW8A8", Family::kFusedMoE, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
        10, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
            {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
            {"text_gate_up", Kind::kInt8, 2, {{2, kInter}, {1, kIn}}, 6, 7},
            {"text_down", Kind::kInt8, 2, {{1, kIn}, {1, kInter}}, 8, 9},
            {"visual_gate_up", Kind::kT, 2, {{2, kInter}, {1, kIn}}},
            {"visual_down", Kind::kT, 2, {{1, kIn}, {1, kInter}}},
            {"text_gate_up_scale", Kind::kFloat32, 1, {{2, kInter}}},
            {"text_gate_up_input_scale", Kind::kFloat32, 0, {}},
            {"text_down_scale", Kind::kFloat32, 1, {{1, kIn}}},
            {"text_down_input_scale", Kind::kFloat32, 0, {}}}},
    {"FusedMoEW8A8", Family::kFusedMoE, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
        14, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
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
            {"visual_down_input_scale", Kind::kFloat32, 0, {}}}},
    {"ExpertLinearTextW8A16", Family::kExpertLinear, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}},
        5, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
            {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
            {"text_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 4, kNone},
            {"visual_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}},
            {"text_weight_scale", Kind::kFloat32, 1, {{1, kOut}}}}},
    {"ExpertLinearW8A16", Family::kExpertLinear, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}},
        6, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
            {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
            {"text_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 4, kNone},
            {"visual_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 5, kNone},
            {"text_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
            {"visual_weight_scale", Kind::kFloat32, 1, {{1, kOut}}}}},
    {"ExpertLinearTextW8A8", Family::kExpertLinear, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}},
        6, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
            {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
            {"text_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 4, 5},
            {"visual_weight", Kind::kT, 2, {{1, kOut}, {1, kIn}}},
            {"text_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
            {"text_weight_input_scale", Kind::kFloat32, 0, {}}}},
    {"ExpertLinearW8A8", Family::kExpertLinear, {"output", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kOut}}},
        8, {{"hidden_states", Kind::kT, 3, {{1, kBatch}, {1, kSequence}, {1, kIn}}},
            {"visual_mask", Kind::kBool, 2, {{1, kBatch}, {1, kSequence}}},
            {"text_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 4, 5},
            {"visual_weight", Kind::kInt8, 2, {{1, kOut}, {1, kIn}}, 6, 7},
            {"text_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
            {"text_weight_input_scale", Kind::kFloat32, 0, {}},
            {"visual_weight_scale", Kind::kFloat32, 1, {{1, kOut}}},
            {"visual_weight_input_scale", Kind::kFloat32, 0, {}}}},
};

} // namespace monoedge::schema
