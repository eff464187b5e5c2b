"""KVM's x86 MMU as a library."""
