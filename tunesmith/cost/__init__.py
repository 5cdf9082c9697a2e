"""What a model and a method cost, as pure integer arithmetic: parameters, FLOPs, bytes by owner. Imports no torch."""
