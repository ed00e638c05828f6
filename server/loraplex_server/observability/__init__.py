"""What operators are told: the journey of every call, as a log line and as a trace; what gauges ask of the parts."""
