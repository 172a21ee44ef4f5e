// containerd's own snapshotter suite, through its own proxy client, against a socket of ours.
//
// test_conformance.py builds this with Debian's packages of Go and of containerd's source (GOPATH mode) and
// runs it as root with GLOWPLUG_SOCKET set. Every case of the suite talks to the same snapshotter, as the
// namespaces of one node do.
package conformance

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"

	// Registers -test.root, without which the suite's mounting cases do nothing.
	_ "github.com/containerd/containerd/pkg/testutil"
)

func TestSnapshotter(t *testing.T) {
	connection, err := grpc.Dial("unix://"+os.Getenv("GLOWPLUG_SOCKET"), grpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "glowplug")
	t.Run("suite", func(t *testing.T) {
		testsuite.SnapshotterSuite(t, "glowplug",
			func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
				return snapshotter, nil, nil
			})
	})
}
