# TensorRT's headers; its library is not needed. Sets tensorrt_headers. "cmake -P headers.cmake" only says whether they
# are here, which needs no compiler.

set(MONOEDGE_TENSORRT_HEADERS "" CACHE PATH "Folder of NvInferRuntime.h")
get_filename_component(checkout "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)
set(MONOEDGE_FETCHED_HEADERS "${checkout}/build/tensorrt_headers" CACHE PATH "Where headers are fetched to")
if(MONOEDGE_TENSORRT_HEADERS)
  set(searched "${MONOEDGE_TENSORRT_HEADERS}")
else()
  set(searched)
  foreach(root "${TENSORRT_ROOT}" "$ENV{TENSORRT_ROOT}")
    if(root)
      list(APPEND searched "${root}/include" "${root}")
    endif()
  endforeach()
  list(APPEND searched
    /usr/include/aarch64-linux-gnu
    /usr/include/x86_64-linux-gnu
    /usr/local/tensorrt/include
    "${MONOEDGE_FETCHED_HEADERS}/kernel_lens/include/tensorrt")
endif()
set(tensorrt_headers)
foreach(folder IN LISTS searched)
  if(NOT tensorrt_headers AND EXISTS "${folder}/NvInferRuntime.h")
    set(tensorrt_headers "${folder}")
  endif()
endforeach()
if(NOT tensorrt_headers)
  list(JOIN searched "\n  " searched)
  file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/build.py" package REGEX "^HEADERS = ")
  string(REGEX MATCH "kernel-lens==[0-9.]+" package "${package}")
  message(FATAL_ERROR
    "TensorRT's headers (NvInferRuntime.h) are in none of\n  ${searched}\n"
    "Set TENSORRT_ROOT or MONOEDGE_TENSORRT_HEADERS, or fetch NVIDIA's Apache-2.0 headers of TensorRT 10.14:\n"
    "  python3 -m pip install --no-deps --target ${MONOEDGE_FETCHED_HEADERS} ${package}\n")
endif()
message(STATUS "TensorRT headers: ${tensorrt_headers}")
