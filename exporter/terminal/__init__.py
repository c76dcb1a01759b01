"""What a person sees and presses: lines, bars and tables out, Ctrl-C and SIGTERM in."""
