# The GPUs to compile for: sets CMAKE_CUDA_ARCHITECTURES where it is not given, and puts numbers in the place of "native".
# "cmake -D CMAKE_CUDA_COMPILER=nvcc -P architectures.cmake" only says what it comes to.

cmake_minimum_required(VERSION 3.22)

set(oldest 80) # The first with cp.async and bf16; runtime/backends/plugin_library.py has the number too.

execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE known)
string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
list(TRANSFORM known REPLACE "sm_" "")

# Not "architectures": CMake 3.22 appends to a variable of that name within project().
set(chosen "${CMAKE_CUDA_ARCHITECTURES}")
if(chosen MATCHES "^native(-real)?$")
  # CMake itself knows the word from 3.24 on. The program is what nvcc asks for its own -arch=native.
  get_filename_component(nvcc "${CMAKE_CUDA_COMPILER}" REALPATH)
  get_filename_component(folder "${nvcc}" DIRECTORY)
  set(chosen)
  if(EXISTS "${folder}/__nvcc_device_query")
    execute_process(COMMAND "${folder}/__nvcc_device_query" OUTPUT_VARIABLE said ERROR_QUIET)
    string(REGEX MATCHALL "[0-9][0-9]+" chosen "${said}")
  endif()
  if(NOT chosen)
    message(FATAL_ERROR
      "CMAKE_CUDA_ARCHITECTURES is native, but CUDA finds no GPU here: name the one to compile for, as 87 for Orin")
  endif()
  list(REMOVE_DUPLICATES chosen)
  list(TRANSFORM chosen APPEND "-real")
elseif(NOT chosen OR chosen MATCHES "^all(-major)?$")
  # A100, RTX 30, Orin, Ada, Hopper, B200, Thor, RTX 50. Machine code runs on later numbers of the same ten, so 80 would
  # do for 86 and 89, but slower; that of Jetsons, 87 and 110, runs nowhere else, nor does others' there.
  # CUDA 12.8 and 12.9 call Thor 101, which its drivers, those of CUDA 13, do not.
  set(chosen)
  foreach(architecture 80 86 87 89 90 100 110 120)
    if(architecture IN_LIST known)
      list(APPEND chosen ${architecture}-real)
      set(newest ${architecture})
    else()
      message(STATUS "No code for SM ${architecture}: this nvcc does not know it")
    endif()
  endforeach()
  if(NOT chosen)
    message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} knows none of our GPUs: install CUDA 12.6 or later")
  endif()
  list(APPEND chosen ${newest}-virtual) # PTX, for GPUs that come later.
endif()

foreach(architecture IN LISTS chosen)
  string(REGEX REPLACE "-(real|virtual)$" "" number "${architecture}")
  if(number MATCHES "^[0-9]+$" AND number LESS oldest)
    message(FATAL_ERROR
      "CMAKE_CUDA_ARCHITECTURES asks for ${number}, but the kernels need SM ${oldest} or later: leave it out")
  elseif(number MATCHES "^[0-9]+$" AND NOT number IN_LIST known)
    list(JOIN known ", " known)
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES asks for ${number}, this nvcc knows ${known}")
  endif()
endforeach()
set(CMAKE_CUDA_ARCHITECTURES "${chosen}")
message(STATUS "Architectures: ${CMAKE_CUDA_ARCHITECTURES}")
