// Says every UDP query back as its own answer: what the machine and dnsperf take for themselves. Usage: echo PORT
#include <arpa/inet.h>
#include <stdlib.h>
#include <sys/socket.h>
int main(int n, char **a) {
  int s = socket(AF_INET, SOCK_DGRAM, 0), one = 1 << 20;
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(a[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, from;
  setsockopt(s, SOL_SOCKET, SO_RCVBUF, &one, sizeof one);
  if (bind(s, (void *)&at, sizeof at)) return 1;
  for (char b[4096];;) {
    socklen_t l = sizeof from;
    ssize_t got = recvfrom(s, b, sizeof b, 0, (void *)&from, &l);
    if (got < 12) continue;
    b[2] |= 0x80;
    sendto(s, b, got, 0, (void *)&from, l);
  }
}
