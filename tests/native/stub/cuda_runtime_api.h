// The few names of the CUDA runtime that cuda/entry/module.cpp and the launchers' headers use, for
// a machine without a toolkit: every device is the host.
#pragma once

#define CUDART_VERSION 0

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "operation not supported";
  }
}
