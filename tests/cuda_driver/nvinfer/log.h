// TensorRT's log as TensorRT has it: each object writes to the logger that it was made with, and what belongs to the
// process (the registry, plugins) to the first logger, as long as anything that was made with it is there.

#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace fake
{

/// What came of a call, as TensorRT writes it: "IRuntime::deserializeCudaEngine: Error Code 1: …".
void say(nvinfer1::ILogger* logger, std::string const& message);

/// The first logger; null where nothing was made with one.
nvinfer1::ILogger* globalLogger();

void retainLogger(nvinfer1::ILogger* logger);
void releaseLogger();

/// Counts runtimes, engines, contexts and configurations that are alive.
void countLive(int change);

/// What real TensorRT would end the process for.
void complain(std::string const& message);

} // namespace fake
